import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import website

from diptych.cli import main
from diptych.cli.curate import COMMANDS, ClipScore
from diptych.machine import count_cores
from diptych.shards.dataset import load_dataset
from samples import TINY_VIT, encode, make_loaded, noise


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["curate", *(str(argument) for argument in arguments)])
    return caught.value.code


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    website.build(folder / "site")
    with website.serve(folder / "site") as server:
        website.crawl(folder / "site", server.host, folder / "pages")
        yield folder, server.host


def test_each_stage_alone_and_all_in_one_make_the_same_shards(site, tmp_path, capsys):
    folder, host = site
    work, one = tmp_path, ("--processes", 1)
    (work / "list.txt").write_text("circle\nsquare\nwhite background\n")
    assert call("queries", "--out", work / "queries", "--lists", work / "list.txt") == 0
    assert "3 queries" in capsys.readouterr().out
    pages = folder / "pages.warc.gz"
    assert call("crawl", "--inputs", pages, "--out", work / "crawl", *one) == 0
    assert "crawl: " in capsys.readouterr().out
    assert call("filter", "--folder", work / "crawl", "--out", work / "filter", *one) == 0
    assert "boilerplate" in capsys.readouterr().out
    assert call("distinct", "--folder", work / "filter", "--out", work / "distinct", *one) == 0
    assert (
        call("match", "--pairs", work / "distinct", "--queries", work / "queries", "--out", work / "match", *one) == 0
    )
    assert "dropped: no_query" in capsys.readouterr().out
    options = ("--limit", 9, "--queries", work / "queries")
    assert call("balance", "--pairs", work / "match", "--out", work / "balance", *options, *one) == 0
    assert "policy" in capsys.readouterr().out
    contact = ("--contact", "https://example.org/test", "--allow-host", host)
    assert call("fetch", "--folder", work / "balance", "--out", work / "fetch", *contact, *one) == 0
    assert "addresses: " in capsys.readouterr().out
    assert call("pictures", "--folder", work / "fetch", "--out", work / "pictures", *one) == 0
    listed = ("--queries", work / "queries/queries.parquet")
    assert call("write", "--folder", work / "pictures", "--out", work / "shards", *listed, *one) == 0
    assert "shards: " in capsys.readouterr().out
    names = ("--work", tmp_path / "all", "--queries", work / "queries", "--inputs", pages)
    assert call("run", *names, *contact, "--limit", 9, *one) == 0
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "over_limit" in printed
    alone, together = (load_dataset(place / "shards") for place in (work, tmp_path / "all"))
    assert alone.content_hash == together.content_hash
    assert (
        call("contamination", "--data", work / "shards", "--against", work / "shards", "--out", work / "copies", *one)
        == 0
    )
    assert "(100.00%) have a copy" in capsys.readouterr().out


def test_a_run_that_is_left_with_nothing_shows_the_funnel_and_the_option(tmp_path, capsys):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text("<img src=a.jpg alt='a red circle on white'>")
    (tmp_path / "list.txt").write_text("circle\n")
    assert call("queries", "--out", tmp_path / "queries", "--lists", tmp_path / "list.txt") == 0
    names = ("--work", tmp_path / "wit", "--queries", tmp_path / "queries", "--inputs", tmp_path / "pages")
    capsys.readouterr()
    assert call("run", *names, "--contact", "https://example.org/test", "--processes", 1) == 2
    told = capsys.readouterr()
    assert [line.split() for line in told.out.splitlines()[:2]] == [
        ["stage", "rows", "kept", "dropped,", "by", "reason"],
        ["crawl", "1", "0", "url_invalid", "1"],
    ]
    assert "crawl left none of its 1 rows (url_invalid 1)" in told.err
    assert "`pages_at` in the table [crawl] of --settings" in told.err
    assert (tmp_path / "wit" / "report.html").exists()
    assert not (tmp_path / "wit" / "filter").exists()


def test_samples_are_deleted_by_key_and_from_a_file(tmp_path, capsys):
    from samples import write_samples

    data = write_samples(tmp_path / "data", count=20)
    keys = [pair.key for pair in load_dataset(data).pairs]
    (tmp_path / "keys.txt").write_text(f"{keys[1]}\n")
    assert call("delete", data, "--key", keys[0], "--from", tmp_path / "keys.txt") == 0
    assert "deleted: 2 samples" in capsys.readouterr().out
    assert call("delete", data, "--url", "http://nowhere/") == 1
    assert "not found: http://nowhere/" in capsys.readouterr().out
    assert call("delete", data, "--compact") == 0
    assert "compacted: 2 samples out of 1 shards" in capsys.readouterr().out
    assert [pair.key for pair in load_dataset(data).pairs] == keys[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("delete", "nowhere"), "nothing to delete was named"),
        (("filter", "--folder", "nowhere", "--out", "out"), "holds no finished stage"),
        (
            ("fetch", "--folder", "foreign", "--out", "out", "--contact", "a@b.example"),
            "first is `diptych curate crawl`",
        ),
        (("crawl", "--inputs", "nowhere.warc.gz", "--out", "out"), "no such file"),
        (("write", "--folder", "nowhere", "--out", "out"), "holds no finished stage"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"URL": ["http://a.example/b.jpg"], "TEXT": ["a"]}), tmp_path / "foreign" / "0.parquet")
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_stage_needs_nothing_heavy(name):
    import subprocess
    import sys

    code = f"""
import sys
from diptych.cli import main
try:
    main(["curate", {name!r}, "--help"])
except SystemExit:
    pass
heavy = [name for name in ("torch", "pyarrow", "numpy", "aiohttp", "selectolax") if name in sys.modules]
sys.exit(str(heavy) if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_model_rates_pairs(tmp_path):
    from diptych import embed_images, embed_texts, save

    loaded = make_loaded(TINY_VIT)
    save(loaded, tmp_path / "model")
    pictures, texts = [encode(noise(seed=i)) for i in range(3)], ["a red dot", "a cat", "a"]
    scores = ClipScore(str(tmp_path / "model"))(pictures, texts)
    images = embed_images(loaded, pictures)
    assert scores == pytest.approx((images * embed_texts(loaded, texts)).sum(-1).tolist(), abs=1e-5)


def test_the_engine_of_the_command_line_is_the_one_that_stages_take():
    from diptych.stage.config import EngineConfig
    from diptych.stage.run import Engine

    engine = Engine.open(EngineConfig(processes=3, redo=True))
    assert (engine.kind, engine.processes, engine.redo) == ("local", 3, True)
    assert Engine.open(EngineConfig()).processes == count_cores()
    assert Engine.open(EngineConfig(engine="ray")).processes == 0


def test_a_misspelled_option_gets_its_like_and_the_help_of_its_stage(capsys):
    assert call("queries", "--out", "x", "--listz", "a") == 2
    told = capsys.readouterr().err
    assert "--lists" in told
    assert "(diptych curate queries --help " in told
    assert len({len(line) for line in told.splitlines()}) == 1
