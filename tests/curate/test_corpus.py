"""Reading a corpus: dumps, lines and captions, packed, and what is said of damaged files."""

import bz2
import gzip
import http.server
import json
import threading
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate.queries import build
from diptych.curate.queries.config import QueriesConfig
from diptych.curate.queries.corpus import find_inputs, read_documents
from diptych.errors import NotFoundError, UsageError

DUMP = b"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<siteinfo><namespaces><namespace key="0" /><namespace key="6">Datei</namespace></namespaces></siteinfo>
<page><title>Dog</title><ns>0</ns><revision><text>A '''dog'''. [[Datei:x.jpg|Bild]]</text></revision></page>
<page><title>Cur</title><ns>0</ns><redirect title="Dog" /><revision><text>#REDIRECT [[Dog]]</text></revision></page>
<page><title>Talk:Dog</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>Empty</title><ns>0</ns><revision><text /></revision></page>
<page><title>Cat</title><ns>0</ns><revision><text>A cat</text></revision></page>
</mediawiki>"""


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".bz2", bz2.compress), (".gz", gzip.compress)])
def test_articles_of_a_dump(suffix, pack, tmp_path):
    path = tmp_path / f"wiki.xml{suffix}"
    path.write_bytes(pack(DUMP))
    assert [text.strip() for text in read_documents(str(path))] == ["A dog.", "A cat"]


def test_a_dump_of_several_packed_streams(tmp_path):
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(bz2.compress(DUMP[:500]) + bz2.compress(DUMP[500:]))
    assert len(list(read_documents(str(path)))) == 2


def test_a_dump_over_http(tmp_path):
    (tmp_path / "wiki.xml.bz2").write_bytes(bz2.compress(DUMP))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/wiki.xml.bz2"
        assert len(list(read_documents(url))) == 2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_lines_and_captions(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("a dog\n\xff café\n".encode()))
    assert list(read_documents(str(tmp_path / "a.txt.gz"))) == ["a dog\n", "ÿ café\n"]
    pq.write_table(pa.table({"key": ["1", "2"], "caption": ["a cat", None]}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"))) == ["a cat"]
    pq.write_table(pa.table({"key": ["1"]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="no column caption or text"):
        list(read_documents(str(tmp_path / "b.parquet")))


def test_json_lines_give_their_texts(tmp_path):
    lines = [{"index": {"_id": "1"}}, {"title": "Dog", "text": "a dog"}, {"caption": "a cat", "text": "no"}]
    for name in ("wiki.jsonl", "cirrus.json.gz"):
        content = "\n".join(json.dumps(line) for line in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert list(read_documents(str(tmp_path / name))) == ["a dog", "a cat"]
    for content, message in (('["a dog"]', "no JSON object: "), ('{"title": "Dog"}', "no line with caption or text")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            list(read_documents(str(tmp_path / "bad.json")))


@pytest.mark.parametrize("name", ["dump.xml.7z", "AA/wiki_00", "list.csv", "pages.gz"])
def test_a_file_of_no_known_kind_is_refused_before_anything_is_counted(tmp_path, name):
    (tmp_path / "a.txt").write_text("a dog")
    config = QueriesConfig(out=tmp_path / "out", corpus=(str(tmp_path / "a.txt"), str(tmp_path / name)))
    with pytest.raises(UsageError, match=r"is of no kind that is read as texts; known are \.xml"):
        build.run(config)
    assert not (tmp_path / "out" / "counting").exists()


def test_a_folder_is_named_as_one(tmp_path):
    (tmp_path / "texts.txt").mkdir()
    with pytest.raises(UsageError, match=r"is a folder; name its files, as in .*/texts.txt/\*"):
        list(read_documents(str(tmp_path / "texts.txt")))


def test_stars_are_spelled_out_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).write_text("x")
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert find_inputs([str(tmp_path / "*.txt"), names[0]]) == names
    with pytest.raises(NotFoundError, match="no file matches"):
        find_inputs([str(tmp_path / "*.xml")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.xml.bz2", bz2.compress(DUMP)[:-20]),
        ("cut.xml", DUMP[:-30]),
        ("cut.txt.gz", gzip.compress(b"dog\n" * 1000, mtime=0)[:-12]),
        ("not.txt.bz2", b"plain text"),
        ("not.parquet", b"plain text"),
    ],
)
def test_damaged_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} cannot be read to its end"):
        list(read_documents(str(tmp_path / name)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        list(read_documents(str(tmp_path / "none.txt")))
