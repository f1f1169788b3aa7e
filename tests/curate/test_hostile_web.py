"""Everything a stranger's address or server can do to a fetch, each held to one named outcome."""

from pathlib import Path

import hostile_web

from diptych.curate.config_fetch import FetchConfig
from diptych.curate.fetch import fetch_partition
from diptych.curate.ledger import Ledger, Reader


def test_every_hostile_case_ends_as_specified_and_nothing_forbidden_is_asked(tmp_path):
    with hostile_web.world() as world:
        cases = hostile_web.cases(world.port)
        outcomes = fetch(tmp_path, [url for url, _ in cases.values()], world)
        wrong = {
            name: (outcomes[url], expected) for name, (url, expected) in cases.items() if outcomes[url] != expected
        }
    assert wrong == {}
    assert len(cases) >= 80
    assert world.forbidden == 0


def fetch(folder: Path, urls: list[str], world: hostile_web.World, **changes) -> dict[str, str | None]:
    settings = {"ports": (80, 443, world.port), "deadline": 2.0, "read_timeout": 1.0, "attempts": 1}
    settings |= {"contact": "https://example.org/crawler", "max_bytes": hostile_web.MAX_BYTES}
    config = FetchConfig(folder=folder, out=folder, **(settings | changes))
    with Ledger(folder / "ledger" / "0000") as ledger:
        ledger.add(urls)
    fetch_partition(config, 0, guard=world.guard())
    with Reader(folder / "ledger", 1) as reader:
        found = {url: reader.find(url) for url in urls}
    return {url: entry.outcome if entry else None for url, entry in found.items()}
