"""Everything a stranger's address or server can do to a fetch, each held to one named outcome."""

import hostile_web


def test_every_hostile_case_ends_as_specified_and_nothing_forbidden_is_asked(tmp_path):
    with hostile_web.world() as world:
        cases = hostile_web.cases(world.port)
        outcomes = hostile_web.fetch_all(tmp_path, [url for url, _ in cases.values()], world)
        wrong = {
            name: (outcomes[url], expected) for name, (url, expected) in cases.items() if outcomes[url] != expected
        }
    assert wrong == {}
    assert len(cases) >= 80
    assert world.forbidden == 0
