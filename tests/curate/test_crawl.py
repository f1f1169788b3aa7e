"""Files of pages to rows of candidates."""

import gzip
import io
import pickle
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.archives import http, packed, page, record, wat
from diptych.curate.pages.config import CrawlConfig
from diptych.curate.pages.crawl import Crawl, _in_batches, find_inputs, run
from diptych.curate.pages.page import Drop, Page, read_pages
from diptych.curate.rows import CANDIDATES, key_of, outcome
from diptych.errors import NotFoundError, UsageError
from diptych.stage.folder import read_rows
from diptych.stage.run import Engine

SETTINGS = {
    "texts": ("alt", "title", "figcaption"),
    "lazy": ("data-src",),
    "srcset": True,
    "opt_outs": ("noai",),
    "page_bytes": 100_000,
    "page_seconds": 1.0,
    "parser_bytes": 512 << 20,
}
PICTURE = b"<img src=i.jpg alt=cat>"


def crawl(*paths: Path, **more) -> list[dict]:
    stage = pickle.loads(pickle.dumps(Crawl(**{**SETTINGS, **more})))
    batches = list(stage(iter([pa.record_batch({"path": [str(path) for path in paths]})])))
    assert all(batch.schema == outcome(CANDIDATES) for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pack(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def summary(rows: list[dict]) -> list[tuple]:
    return [(row["page_url"], row["image_url"], row["reason"]) for row in rows]


def test_every_encoding_of_a_response_is_undone(tmp_path):
    chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in (PICTURE[:9], PICTURE[9:])) + b"0\r\n\r\n"
    raw = zlib.compressobj(wbits=-15)
    cyrillic = "<img src=i.jpg alt=кот>".encode("cp1251")
    records = [
        page("http://a.example/0", PICTURE),
        page("http://a.example/1", chunks, "Transfer-Encoding: chunked"),
        page("http://a.example/2", PICTURE, "Transfer-Encoding: chunked"),
        page("http://a.example/3", gzip.compress(PICTURE), "Content-Encoding: gzip"),
        page("http://a.example/4", PICTURE, "Content-Encoding: gzip"),
        page("http://a.example/5", zlib.compress(PICTURE), "Content-Encoding: deflate"),
        page("http://a.example/6", raw.compress(PICTURE) + raw.flush(), "content-encoding: DEFLATE"),
        *(
            page(f"http://a.example/{name}", body, f"Content-Encoding: {encodings}")
            for name, encodings, body in (
                ("br", "br", pack(PICTURE, "brotli")),
                ("zstd", "zstd", pack(PICTURE, "zstd")),
                ("list", "gzip, identity", gzip.compress(PICTURE)),
                ("twice", "gzip,gzip", gzip.compress(gzip.compress(PICTURE))),
                ("both", "br, GZIP", gzip.compress(pack(PICTURE, "brotli"))),
            )
        ),
        page("http://a.example/7", cyrillic, content_type="text/html; Charset='windows-1251'"),
        record("resource", "http://a.example/8", PICTURE, "text/html"),
        wat("http://a.example/9", [{"path": "IMG@/src", "url": "i.jpg", "alt": "cat"}]),
        page("http://a.example/", PICTURE, status="404 Not Found"),
        page("http://a.example/", PICTURE, content_type="image/jpeg"),
        record("revisit", "http://a.example/", http(PICTURE)),
        record("response", "dns:a.example", PICTURE, "text/dns"),
    ]  # fmt: skip
    rows = crawl(write(tmp_path / "a.warc.gz", packed(records)))
    names = [*range(7), "br", "zstd", "list", "twice", "both", 7, 8, 9]
    assert [row["page_url"] for row in rows] == [f"http://a.example/{name}" for name in names]
    assert {row["image_url"] for row in rows} == {"http://a.example/i.jpg"}
    assert [row["caption"] for row in rows] == ["cat"] * 12 + ["кот"] + ["cat"] * 2
    assert dict(rows[0]["details"]) == {"from": "alt", "crawl": "a.warc.gz"}
    assert rows[0]["key"] == key_of("http://a.example/i.jpg", "cat")


def test_what_gives_nothing_has_a_reason(tmp_path):
    bomb = gzip.compress(bytes(50 << 20))
    whole = packed([
        page("http://a.example/0", b"<p>no picture"),
        page("http://a.example/1", b"<img src=x>"),
        page("http://a.example/2", b"<meta name=robots content=noai>" + PICTURE),
        page("http://a.example/3", PICTURE, "X-Robots-Tag: noai"),
        page("http://a.example/4", bomb, "Content-Encoding: gzip"),
        page("http://a.example/5", PICTURE + bytes(200_000)),
        page("http://a.example/6", b"\x99\x99", "Content-Encoding: br"),
        page("http://a.example/7", b"<div>" * 19_900 + PICTURE),
        page("http://a.example/a", pack(bytes(50 << 20), "brotli"), "Content-Encoding: br"),
        page("http://a.example/b", PICTURE, "Content-Encoding: gzip, gzip, gzip, gzip, gzip"),
        page("http://a.example/c", PICTURE, content_type=""),
        page("http://a.example/d", PICTURE, "Content-Encoding: compress"),
        page("http://a.example/8", PICTURE),
    ])  # fmt: skip
    rows = crawl(write(tmp_path / "a.warc.gz", whole[:-10]), page_seconds=0.1)
    reasons = [(row["page_url"] or "")[-1:] + str(row["reason"]) for row in rows]
    assert reasons == [
        "0page_no_pair", "1page_no_pair", "2opt_out", "3opt_out", "4page_too_large", "5page_too_large",
        "6page_encoding", "7page_time", "apage_too_large", "bpage_encoding", "cpage_type", "dpage_encoding",
        "record_truncated",
    ]  # fmt: skip
    assert dict(rows[-1]["details"])["crawl"] == "a.warc.gz"
    assert summary(crawl(write(tmp_path / "b.warc.gz", whole)))[-1] == (
        "http://a.example/8", "http://a.example/i.jpg", None,
    )  # fmt: skip


def test_what_servers_and_archives_get_wrong_is_read(tmp_path):
    chunks = b"%x\n%s\n" % (9, PICTURE[:9]) + b"%x\n%s\n0\n\n" % (len(PICTURE) - 9, PICTURE[9:])
    records = [
        page("http://a.example/0", chunks, "Transfer-Encoding: chunked"),
        page("<http://a.example/1>", PICTURE),
        page("http://a.example/2", "\ufeff<img src=i.jpg alt=cat>".encode("utf-16-be")),
        page("http://a.example/3", PICTURE, "X-Robots-Tag: noai", "X-Robots-Tag: max-snippet: 3"),
        record("metadata", "http://a.example/4", b"software: x", "application/warc-fields"),
        record("resource", "urn:x", PICTURE, "text/html"),
        page("dns:a.example", PICTURE),
        record("metadata", "http://a.example/5", b"[" * 200_000, "application/json"),
    ]
    (tmp_path / "folder.warc").mkdir()
    rows = crawl(write(tmp_path / "a.warc.gz", packed(records)), tmp_path / "folder.warc")
    assert [((row["page_url"] or "")[-1:], row["reason"]) for row in rows] == [
        ("0", None), ("1", None), ("2", None), ("3", "opt_out"), ("5", "record_too_large"), ("", "file_unreadable"),
    ]  # fmt: skip
    assert [row["image_url"] for row in rows[:3]] == ["http://a.example/i.jpg"] * 3


def test_pages_go_to_the_parser_in_batches_of_bounded_size():
    pages = [Page("html", "http://a.example/", "", "", bytes(1 << 20))] * 7 + [Page("html", "", "", "", b"")] * 200
    sizes = [(len(batch), len(drops)) for batch, drops in _in_batches(iter([*pages, Drop("", "x", 0)]))]
    assert sizes == [(2, 0), (2, 0), (2, 0), (128, 0), (73, 1)]


def test_a_page_is_not_unpacked_beyond_the_limit():
    record = page("http://a.example/", gzip.compress(bytes(200 << 20)), "Content-Encoding: gzip")
    tracemalloc.start()
    found = list(read_pages(io.BytesIO(packed([record])), "a.warc.gz", "", 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.reason for one in found if isinstance(one, Drop)] == ["page_too_large"]
    assert peak < 20 << 20


def test_the_closest_folder_places_a_plain_file(tmp_path):
    path = write(tmp_path / "site/deep/a.html", PICTURE)
    for roots in ((f"{tmp_path}/site", f"{tmp_path}/site/deep"), (f"{tmp_path}/site/deep", f"{tmp_path}/site")):
        assert crawl(path, roots=roots, pages_at="http://a.example/")[0]["page_url"] == "http://a.example/a.html"


def test_plain_files_are_found_at_the_url_they_came_from(tmp_path):
    write(tmp_path / "site/a.html", PICTURE)
    write(tmp_path / "site/deep/b.htm", b"<img src=../j.jpg alt=dog>")
    write(tmp_path / "site/c.html.gz", gzip.compress(PICTURE))
    write(tmp_path / "site/notes.txt", PICTURE)
    config = CrawlConfig(
        inputs=(f"{tmp_path}/site/",), out=tmp_path / "out", pages_at="http://a.example/x/", files_per_task=2
    )
    report = run(config, engine=Engine())
    rows = [row for batch in read_rows(tmp_path / "out") for row in batch.to_pylist()]
    assert (report.kept, report.dropped, report.done) == (3, {}, 2)
    assert {(row["page_url"], row["image_url"]) for row in rows} == {
        ("http://a.example/x/a.html", "http://a.example/x/i.jpg"),
        ("http://a.example/x/deep/b.htm", "http://a.example/x/j.jpg"),
        ("http://a.example/x/c.html.gz", "http://a.example/x/i.jpg"),
    }
    unplaced = crawl(tmp_path / "site/a.html")
    assert [row["reason"] for row in unplaced] == ["url_invalid"]


def test_processes_and_place_do_not_change_the_outcome(tmp_path):
    hashes = set()
    for name, processes in (("one", 0), ("two", 2)):
        for i in range(3):
            records = [page(f"http://{i}.example/{j}", PICTURE) for j in range(20)]
            write(tmp_path / name / f"{i}.warc.gz", packed(records))
        config = CrawlConfig(inputs=(str(tmp_path / name),), out=tmp_path / name / "out")
        hashes.add(run(config, engine=Engine(processes=processes)).hash)
    assert len(hashes) == 1


def test_lists_and_urls_are_inputs(tmp_path):
    write(tmp_path / "crawl/1.warc.gz", b"")
    listed = write(tmp_path / "warc.paths.gz", gzip.compress(b"crawl/2.warc.gz\n\ncrawl/1.warc.gz\n"))
    archives, plain, roots = find_inputs([str(listed), f"file://{tmp_path}/crawl"], prefix="s3://bucket/")
    assert archives == [
        f"file://{tmp_path}/crawl/1.warc.gz",
        "s3://bucket/crawl/1.warc.gz",
        "s3://bucket/crawl/2.warc.gz",
    ]
    assert (plain, roots) == ([], (f"file://{tmp_path}/crawl",))
    rows = crawl(write(tmp_path / "u.warc", page("http://a.example/", PICTURE)).as_uri())  # pyright: ignore
    assert summary(rows) == [("http://a.example/", "http://a.example/i.jpg", None)]


def test_what_a_folder_has_besides_is_counted(tmp_path, caplog):
    write(tmp_path / "in" / "a.html", PICTURE)
    for name in ("b.warc.zst", "c.arc.gz", "d.jpg", "e.jpg", "README"):
        write(tmp_path / "in" / name, b"")
    assert find_inputs([str(tmp_path / "in")])[1] == [f"{tmp_path}/in/a.html"]
    assert caplog.messages == ["5 files are not read as pages: .jpg 2, no suffix 1, .warc.zst 1, .arc.gz 1"]
    (tmp_path / "in" / "a.html").unlink()
    with pytest.raises(NotFoundError, match=r"others are there: .*\.warc\.zst 1"):
        find_inputs([str(tmp_path / "in")])


def test_dropped_rows_say_where_they_came_from(tmp_path):
    data = packed([page("http://a.example/1", b"\x99", "Content-Encoding: br"), page("http://a.example/2", PICTURE)])
    write(tmp_path / "a.warc.gz", data + b"no record")
    run(CrawlConfig(inputs=(str(tmp_path / "a.warc.gz"),), out=tmp_path / "out"), engine=Engine())
    rows = pq.read_table(tmp_path / "out" / "dropped" / "part-00000.parquet").to_pylist()
    told = [(row["page_url"], dict(row["details"])) for row in rows]
    assert told[0] == ("http://a.example/1", {"crawl": "a.warc.gz", "offset": "0"})
    assert told[1:] == [(None, {"crawl": "a.warc.gz", "offset": str(len(data))})]


def test_inputs_that_are_not_there_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="neither a folder that is there nor named like"):
        find_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(NotFoundError, match="no page in"):
        find_inputs([str(tmp_path)])
    with pytest.raises(NotFoundError, match="is not there"):
        crawl(tmp_path / "gone.warc.gz")
    with pytest.raises(UsageError, match="cannot be listed"):
        find_inputs(["nonsense://x/y"])
    with pytest.raises(UsageError, match="inputs is empty"):
        CrawlConfig(inputs=(), out=tmp_path)
