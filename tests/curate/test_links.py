import hashlib
import json

import fetching
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fetching import config_for, engine, fetch, serve

from diptych.cli import main
from diptych.curate import links, write
from diptych.curate.config import LinksConfig, WriteConfig
from diptych.curate.rows import key_of
from diptych.errors import UsageError
from diptych.shards.dataset import load_dataset
from diptych.stage.folder import read_rows
from diptych.stage.run import Engine

URLS = [f"https://host.example/{i}.jpg?a=1,2" for i in range(10)]


def read(out, *inputs, processes=0, **fields):
    config = LinksConfig(inputs=tuple(map(str, inputs)), out=out, **fields)
    report = links.run(config, links.open_lists(config), engine=Engine(processes=processes))
    return report, [row for batch in read_rows(out) for row in batch.to_pylist()]


def write_laion(path):
    table = {"URL": URLS, "TEXT": [f"text {i}" for i in range(10)], "WIDTH": list(range(10)), "similarity": [0.25] * 10}
    pq.write_table(pa.table(table), path, row_group_size=4)


def write_datacomp(path):
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(10)]
    table = {"uid": ["u"] * 10, "url": URLS, "text": [f"text {i}" for i in range(10)], "sha256": hashes}
    pq.write_table(pa.table(table), path)


def write_cc12m(path):
    path.write_text("\n".join(f"{url}\ttext {i}" for i, url in enumerate(URLS)))


def write_cc3m(path):
    path.write_text("\n".join(f"text {i}\t{url}" for i, url in enumerate(URLS)))


def write_csv(path):
    path.write_text("\n".join(["url,page_url,caption", *(f'"{url}",http://p/,text {i}' for i, url in enumerate(URLS))]))


def write_lines(path):
    path.write_text("\n".join(json.dumps({"image_url": url, "caption": f"text {i}"}) for i, url in enumerate(URLS)))


@pytest.mark.parametrize("kind", ["laion", "datacomp", "cc12m", "cc3m", "csv", "lines"])
def test_lists_become_candidates_in_parts_of_some_rows(tmp_path, kind):
    globals()[f"write_{kind}"](tmp_path / "list")
    report, rows = read(tmp_path / "out", tmp_path / "list", rows_per_task=3)
    assert (report.rows, report.kept, report.done) == (10, 10, 4)
    assert [(row["image_url"], row["caption"]) for row in rows] == [(url, f"text {i}") for i, url in enumerate(URLS)]
    assert [row["key"] for row in rows] == [key_of(url, f"text {i}") for i, url in enumerate(URLS)]
    if kind == "laion":
        assert json.loads(rows[3]["details"]) == {"WIDTH": 3, "similarity": 0.25}
    if kind == "csv":
        assert {row["page_url"] for row in rows} == {"http://p/"}
        assert {row["details"] for row in rows} == {"{}"}


def test_rows_without_an_address_or_a_text_have_reasons(tmp_path):
    lines = [
        {"url": URLS[0], "text": "fine"}, {"url": "ftp://host/a.jpg", "text": "x"}, {"url": "a.jpg", "text": "x"},
        {"url": None, "text": "x"}, {"url": URLS[1], "text": None}, {"url": URLS[2], "text": ["one", "two"]},
        {"url": URLS[3], "text": "\ud83d"},
    ]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join([*map(json.dumps, lines), "no json"]))
    report, rows = read(tmp_path / "out", tmp_path / "list.jsonl", url_column="url")
    assert report.dropped == {"bad_row": 1, "bad_text": 1, "no_caption": 1, "url_invalid": 2, "url_scheme": 1}
    assert [(row["image_url"], row["caption"]) for row in rows] == [
        (URLS[0], "fine"), (URLS[2], "one"), (URLS[2], "two")
    ]  # fmt: skip


def test_lists_without_addresses_or_with_several_columns_of_them_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.jpg,red\n")
    with pytest.raises(UsageError, match="no column of addresses; it has image, caption"):
        read(tmp_path / "out", tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(f"a;b;caption\n{URLS[0]};{URLS[1]};red\n")
    with pytest.raises(UsageError, match="a, b may hold the pictures; say which by --url-column"):
        read(tmp_path / "out", tmp_path / "b.csv")


def test_a_list_is_fetched_verified_and_written(tmp_path):
    with serve() as server:
        texts = [f"a picture, number {i}" for i in range(6)]
        said = [hashlib.new(kind, fetching.draw(i)).hexdigest() for i, kind in enumerate(("sha256", "md5", "sha512"))]
        said += [hashlib.sha256(b"another").hexdigest(), "no hash", None]
        table = {"url": [server.url(i) for i in range(6)], "text": texts, "hash": said, "width": [640] * 6}
        pq.write_table(pa.table(table), tmp_path / "list.parquet")
        read(tmp_path / "links", tmp_path / "list.parquet", hash_column="hash")
        report = fetch(config_for(tmp_path / "links", tmp_path / "fetch", server))
    assert report.stage.dropped == {"hash_differs": 1}
    write.run(WriteConfig(folder=tmp_path / "fetch", out=tmp_path / "shards"), engine=engine)
    pairs = {pair.caption: pair for pair in load_dataset(tmp_path / "shards").pairs}
    assert pairs.keys() == {text for i, text in enumerate(texts) if i != 3}
    assert pairs[texts[1]].image == fetching.draw(1)
    details = pairs[texts[1]].details
    assert (details["image_url"], details["width"], details["original_width"]) == (table["url"][1], 48, 48)


def test_the_command_says_what_it_took_the_columns_for(tmp_path, capsys):
    write_laion(tmp_path / "part-0.parquet")
    write_laion(tmp_path / "part-1.parquet")
    with pytest.raises(SystemExit) as ended:
        main(["curate", "links", "--inputs", f"{tmp_path}/part-*.parquet", "--out", str(tmp_path / "out")])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.count("Parquet, 10 samples; pictures: URL, captions: TEXT") == 2
    assert "out: 20 rows, 20 kept" in said
