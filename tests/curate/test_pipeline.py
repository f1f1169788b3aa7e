import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import website

from diptych.curate import delete, pipeline
from diptych.curate.config import DeleteConfig, PipelineConfig
from diptych.curate.funnel import read_funnel
from diptych.curate.rows import draw
from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.stage import folder as parts
from diptych.stage.run import Engine
from samples import train_config


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    website.build(folder / "site")
    website.write_queries(folder / "queries.parquet")
    with website.serve(folder / "site") as server:
        website.crawl(folder / "site", server.host, folder / "pages")
        yield folder, server


def configure(site, work: Path, **changes) -> PipelineConfig:
    folder, server = site
    values = {
        "work": work,
        "inputs": (str(folder / "pages.warc.gz"), str(folder / "second.warc.gz")),
        "queries": folder / "queries.parquet",
        "contact": "https://example.org/test",
        "limit": 20,
        "allow_host": (server.host,),
    }
    return PipelineConfig(**values | changes)


def run(config: PipelineConfig, *, processes: int = 1, redo: bool = False, until: str = "shards"):
    with Engine(processes=processes, redo=redo) as engine:
        return pipeline.run(config, engine=engine, until=until)


@pytest.fixture(scope="module")
def straight(site, tmp_path_factory):
    work = tmp_path_factory.mktemp("straight")
    return work, run(configure(site, work))


def shards_of(work: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that held it."""
    return {path.name: path.read_bytes() for path in sorted((work / "shards").glob("[!.]*")) if path.is_file()}


def test_pages_become_shards_and_every_row_has_a_reason(straight):
    _, report = straight
    steps = {step.name: step for step in report.funnel.stages}
    assert list(steps) == list(pipeline.STAGES)
    for step in report.funnel.stages:
        assert step.rows == step.kept + sum(step.dropped.values())
    for before, after in itertools.pairwise(report.funnel.stages):
        assert after.rows == before.kept
    assert set(steps["filter"].dropped) == {"boilerplate", "language"}
    assert steps["distinct"].dropped["duplicate"] > 0
    assert steps["match"].dropped == {"no_query": 1}
    assert steps["balance"].dropped["over_limit"] > 0
    assert steps["shards"].kept > 10


def test_a_sample_can_be_traced_to_its_page_and_its_draw(straight):
    work, _ = straight
    for pair in load_dataset(work / "shards").pairs:
        colour, shape = pair.caption.split()[1:3]
        assert pair.details["page_url"].endswith(f"/{colour}.html")
        assert f"/pictures/{colour}-{shape}." in pair.details["image_url"]
        assert {colour, shape, "white background"} <= set(json.loads(pair.details["queries"]))
        assert 0 <= float(pair.details["draw"]) < 1
        assert len(pair.details["sha256"]) == 64


def test_the_order_of_the_shards_has_nothing_to_do_with_the_draws(straight):
    work, _ = straight
    draws = [float(pair.details["draw"]) for pair in load_dataset(work / "shards").pairs]
    rising = sum(a < b for a, b in itertools.pairwise(draws))
    assert 0.2 < rising / (len(draws) - 1) < 0.8


def test_the_report_names_every_stage_and_reason(straight):
    _, report = straight
    html, text = report.html.read_text(), str(report.funnel)
    for step in report.funnel.stages:
        for place in (html, text):
            assert all(word in place for word in (step.name, *step.dropped))
        assert step.hash in html
    assert "Une image qui ne montre" in html
    assert "white background" in html


def test_two_runs_and_any_number_of_processes_give_the_same_hash(site, straight, tmp_path):
    work, report = straight
    again = run(configure(site, tmp_path / "elsewhere"), processes=2)
    assert [step.hash for step in again.funnel.stages] == [step.hash for step in report.funnel.stages]
    assert shards_of(tmp_path / "elsewhere") == shards_of(work)


def test_a_finished_run_asks_the_web_for_nothing_and_does_nothing(site, straight):
    work, report = straight
    _, server = site
    asked = server.asked.total()
    again = run(configure(site, work))
    assert again.hash == report.hash
    assert server.asked.total() - asked <= 10  # pictures that were not there are asked for again, and robots.txt


def test_a_training_run_reads_the_shards(straight, tmp_path):
    from diptych.train import loop

    work, _ = straight
    report = loop.run(train_config(work / "shards", tmp_path / "run", steps=3))
    assert (report.steps, report.skipped) == (3, {})


def test_without_allow_host_nothing_is_asked_of_this_machine(site, tmp_path):
    _, server = site
    asked = server.asked.total()
    report = run(configure(site, tmp_path, allow_host=()))
    assert [stage.name for stage in report.funnel.stages][-1] == "fetch"
    assert "--allow-host" in report.left_nothing
    assert server.asked.total() == asked
    manifest = parts.read_manifest(tmp_path / "fetch")
    assert manifest.kept == 0
    assert set(manifest.dropped) <= {"address", "port"}


def test_a_damaged_part_is_made_again_and_the_hash_is_the_same(site, straight, tmp_path):
    config = configure(site, tmp_path)
    report = run(config, until="match")
    part = tmp_path / "filter/part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    assert run(config, until="match").hash == report.hash
    assert part.read_bytes() != data


def test_other_settings_are_refused_unless_they_are_to_be_redone(site, tmp_path):
    run(configure(site, tmp_path), until="balance")
    with pytest.raises(UsageError, match=r"balance.* was begun with other settings.*--redo"):
        run(configure(site, tmp_path, limit=3), until="balance")
    few = run(configure(site, tmp_path, limit=3), redo=True, until="balance")
    assert few.funnel.stages[-1].kept <= 3 * 19
    assert run(configure(site, tmp_path, limit=3), until="balance").hash == few.hash


def test_a_stage_that_was_made_of_something_else_is_not_reported_as_one_funnel(site, tmp_path):
    run(configure(site, tmp_path), until="match")
    settings = tmp_path / "settings.toml"
    settings.write_text("[filter]\nmin_words = 7\n")
    run(configure(site, tmp_path, settings=settings), redo=True, until="filter")
    with pytest.raises(ShardError, match="distinct was not made of what filter holds now"):
        read_funnel([tmp_path / name for name in ("crawl", "filter", "distinct")])


def test_what_was_deleted_stays_deleted_when_the_run_goes_on(site, straight, tmp_path):
    work, report = straight
    shutil.copytree(work, tmp_path / "work")
    gone = next(iter(load_dataset(work / "shards").pairs)).key
    delete.run(DeleteConfig(shards=tmp_path / "work/shards", key=(gone,)))
    assert run(configure(site, tmp_path / "work")).hash == report.hash
    assert gone not in {pair.key for pair in load_dataset(tmp_path / "work/shards").pairs}
    delete.run(DeleteConfig(shards=tmp_path / "work/shards", compact=True))
    after = run(configure(site, tmp_path / "work"))
    assert after.funnel.stages[-1].dropped == {"deleted": 1}
    assert after.hash != report.hash
    assert gone not in {pair.key for pair in load_dataset(tmp_path / "work/shards").pairs}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[filters]", "unknown stage in .* did you mean filter"),
        ("[filter]\nmin_word = 1", "unknown key in FilterConfig 'min_word'; did you mean min_words"),
        ("[balance]\nlimit = 3", "limit of balance .* is given on the command line"),
        ("[fetch]\nsize = 'big'", "'big' is not one of the values"),
        ("filter = 3", "filter .* is not a table"),
        ("[filter", "is not TOML"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_is_done(site, tmp_path, text, message):
    settings = tmp_path / "settings.toml"
    settings.write_text(text)
    with pytest.raises(UsageError, match=message):
        run(configure(site, tmp_path / "work", settings=settings))
    assert not (tmp_path / "work/crawl").exists()


def test_missing_settings_and_queries_are_told_before_anything_is_done(site, tmp_path):
    for changes in ({"settings": tmp_path / "none.toml"}, {"queries": tmp_path / "none.parquet"}):
        with pytest.raises(NotFoundError, match="none"):
            run(configure(site, tmp_path / "work", **changes))
    assert not (tmp_path / "work/match").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_the_same_hash(site, straight, tmp_path):
    work, report = straight
    config = configure(site, tmp_path / "work")
    command = [sys.executable, "-m", "diptych", "curate", "run", "--processes", "2", "--work", str(config.work)]
    command += ["--inputs", *config.inputs, "--queries", str(config.queries), "--limit", str(config.limit)]
    command += ["--contact", config.contact, "--allow-host", *config.allow_host]
    kills = 0
    for number in range(40):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(0.8 * 1.4**number * (0.6 + 0.8 * draw(1, number))) == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    after = {name: parts.read_manifest(tmp_path / "work" / name).hash for name in pipeline.STAGES}
    assert after == {step.name: step.hash for step in report.funnel.stages}
    assert shards_of(tmp_path / "work") == shards_of(work)


def test_the_shards_go_into_a_loader(straight):
    import torch

    from diptych.shards.loader import Loader

    work, _ = straight
    loader = Loader(
        [SourceConfig(path=work / "shards")],
        LoaderConfig(batch_size=8, workers=0),
        32,
        lambda captions: torch.tensor([[len(caption)] for caption in captions]),
    )
    assert next(iter(loader)).skipped == ()
