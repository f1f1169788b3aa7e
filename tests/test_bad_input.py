"""Every cell of docs/bad-input.md, by the command that it is about."""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diptych.checkpoint import layouts
from diptych.cli import main
from diptych.curate.rows import read_queries
from diptych.errors import DiptychError
from diptych.image_file import SUFFIXES
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.loader import Loader
from diptych.tokenizer import Tokenizer
from samples import TINY_VIT, draw, encode, make_loaded
from strangers.pictures import many_scans

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
JPEG = encode(draw("red", "circle", 200))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
HEADER = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + HEADER + struct.pack(">I", zlib.crc32(b"IHDR" + HEADER)) + b"\0\0\x03\xe7IDAT"


def png(image: Image.Image, **options) -> bytes:
    return encode(image, "PNG", **options)


def comment() -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * (3 << 20), zip=True)
    return png(draw("red", "dot"), pnginfo=about)


STRIPE = png(Image.new("L", (1, 20_000), 90))
CLEAR = png(Image.new("RGBA", (50, 40), (255, 0, 0, 0)))
FILES = {
    "a picture that breaks off": ("a.jpg", JPEG[:900]),
    "text called .jpg": ("a.jpg", b"hello"),
    "a web page called .jpg": ("a.jpg", b"<!DOCTYPE html><html>"),
    "PostScript called .jpg (no program is started)": ("a.jpg", EPS),
    "an empty file": ("a.jpg", b""),
    "a link that leads nowhere": ("a.jpg", "link"),
    "a named pipe": ("a.jpg", "pipe"),
    "a file of 200 GB that is all holes": ("a.jpg", "holes"),
    "a header of 60,000 x 60,000 pixels": ("a.png", BOMB),
    "a JPEG that goes over its pixels 2,000 times": ("a.jpg", many_scans()),
    "1 x 20,000 pixels": ("a.png", STRIPE),
    "a transparent picture": ("a.png", CLEAR),
    "16-bit grey": ("a.png", png(Image.fromarray(np.full((40, 50), 30_000, np.uint16)))),
    "a comment of 3 MB": ("a.png", comment()),
    "TIFF": ("a.tif", encode(draw("red", "dot"), "TIFF")),
    "a name with terminal escapes and markup": ("[bold]\x1b]0;P\x07[\x1b.jpg", JPEG),
    "a name that is not UTF-8": (os.fsdecode(b"a\xff.jpg"), JPEG),
    "a folder called .jpg": ("a.jpg", "folder"),
    "a file whose name begins with a dot": (".a.jpg", JPEG),
    "HEIC, without the extra `heic`": ("a.heic", b"\0\0\0\x18ftypheic" + bytes(100)),
}
TEXT = b"a red circle"
SAMPLES: dict[str, list[tuple[str, bytes | str]]] = {
    "a picture that breaks off": [("b.jpg", JPEG[:900]), ("b.txt", TEXT)],
    "text called .jpg": [("b.jpg", b"hello"), ("b.txt", TEXT)],
    "PostScript called .jpg": [("b.jpg", EPS), ("b.txt", TEXT)],
    "an empty picture": [("b.jpg", b""), ("b.txt", TEXT)],
    "a link": [("b.jpg", "link"), ("b.txt", TEXT)],
    "no caption": [("b.jpg", JPEG)],
    "an empty caption": [("b.jpg", JPEG), ("b.txt", b" \n")],
    "a caption that is not UTF-8": [("b.jpg", JPEG), ("b.txt", b"caf\xe9")],
    "a caption of 2 MB": [("b.jpg", JPEG), ("b.txt", b"x" * (2 << 20))],
    "JSON nested 100,000 deep": [("b.jpg", JPEG), ("b.txt", TEXT), ("b.json", b"[" * 100_000)],
    "a caption with an entity of 5,000 digits": [("b.jpg", JPEG), ("b.txt", b"a &#" + b"9" * 5000 + b"; b")],
    "1 x 20,000 pixels": [("b.png", STRIPE), ("b.txt", TEXT)],
    "two files of macOS beside it": [("._b.jpg", b"x"), ("b.jpg", JPEG), ("._b.txt", b"x"), ("b.txt", TEXT)],
}
LINES = {
    "not UTF-8": b"caf\xe9",
    "of 2 MB": b"x" * (2 << 20),
    "empty": b"  ",
    "with a NUL, escapes or half an emoji": b"a\0 \x1b[2J &#xD83D;",
    "longer than the model reads": b"word " * 500,
}


ARGUMENTS: dict[str, list[tuple[str, bytes | str | int]]] = {
    "a pipe, socket or device, or a link to one": [
        (name, "pipe") for name in ("labels", "toml", "csv", "list", "texts")
    ],
    "a file without permission, a folder in place of a file": [(name, "folder") for name in ("labels", "toml", "list")],
    "JSON, TOML, a list of labels of more than 64 MiB, a CSV or list of keys of more than 256 MiB": [
        ("labels", 65 << 20),
        ("toml", 65 << 20),
        ("csv", 257 << 20),
        ("keys", 257 << 20),
    ],
    "a text that is not UTF-8 where a list, table or TOML is due": [
        (name, b"caf\xe9\n") for name in ("labels", "toml", "csv", "list", "keys")
    ],
    "a line of 1 MiB in a list of queries; in a corpus, in page views": [
        (name, b"a lamp\nen Lamp 12 0\n" + b"x" * (2 << 20)) for name in ("list", "corpus", "pageviews")
    ],
    "a table of queries that is empty, damaged, or lacks `id` or `text`": [("queries", b""), ("queries", b"PAR1" * 9)],
    "a file of ours that was changed: its record, index, manifest or log": [
        ("done/00000.json", b"{"),
        ("features/00000.parquet", b"PAR1"),
        ("manifest.json", b"{"),
    ],
}
"""What an argument names -> what it is to be for which command, or a file of ours and what became of it."""


SUFFIX = {"toml": ".toml", "csv": ".csv", "queries": ".parquet"}


def read_tables() -> dict[str, dict[str, list[str]]]:
    """Heading of a section -> first cell -> the other cells."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            tables[line[3:]] = {}
        elif line.startswith("| ") and tables:
            first, *cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            tables[list(tables)[-1]][first] = [cell.strip("`") for cell in cells]
    return tables


TABLES = read_tables()


def test_the_page_has_a_row_for_every_kind_and_none_besides():
    for section, kinds in (
        ("Files of a folder", FILES),
        ("Members of a tar", SAMPLES),
        ("Lines of a text file", LINES),
        ("Arguments", ARGUMENTS),
    ):
        assert list(TABLES[section])[1:] == list(kinds)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    layouts.save(make_loaded(TINY_VIT), folder)
    return folder


def lay(folder: Path, name: str, content: bytes | str) -> None:
    """A good picture, and beside it the bad thing."""
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(JPEG)
    match content:
        case "link":
            (folder / name).symlink_to("nowhere")
        case "pipe":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
        case "holes":
            with open(folder / name, "wb") as file:
                file.truncate(200 << 30)
        case bytes():
            (folder / name).write_bytes(content)


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])


def expected(cell: str) -> dict[str, int]:
    return {} if cell in ("used", "ignored", "counted by suffix") else {cell: 1}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_a_folder(kind, model, tmp_path, capsys):
    if kind.startswith("HEIC") and "HEIF" in SUFFIXES:
        pytest.skip("the extra `heic` is installed")
    by_classify, by_embed, by_evaluate = TABLES["Files of a folder"][kind]
    name, content = FILES[kind]
    lay(tmp_path / "set" / "a", name, content)
    lay(tmp_path / "set" / "b", "other.jpg", JPEG)
    count = {"ignored": 3, "counted by suffix": 3, "used": 4}

    call("classify", tmp_path / "set", "--labels", "a", "b", "--model", model, "--json")
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == count.get(by_classify, 3)
    reasons = re.findall(r"skipped, (\w+):", printed.err)
    assert dict.fromkeys(reasons, 1) == expected(by_classify)
    assert (".heic 1" in printed.err) == (by_classify == "counted by suffix")
    assert "\x1b" not in printed.err

    call("embed", model, tmp_path / "set", "--out", tmp_path / "features", "--precision", "float32", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["features"], report["skipped"]) == (count.get(by_embed, 3), expected(by_embed))
    assert report["passed_over"] == ({".heic": 1} if by_embed == "counted by suffix" else {})

    (suite := tmp_path / "mine.toml").write_text("[data]\npath = 'set'\n")
    call("evaluate", "--model", model, "--suite", suite, "--out", tmp_path / "results", "--json")
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["images"], result["skipped"]) == (count.get(by_evaluate, 3), expected(by_evaluate))
    assert any(".heic 1" in warning for warning in result["warnings"]) == (by_evaluate == "counted by suffix")


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_member_of_a_tar(kind, model, tmp_path, capsys):
    by_embed, by_train = TABLES["Members of a tar"][kind]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        good = [(f"{key}.{suffix}", data) for key in "ac" for suffix, data in (("jpg", JPEG), ("txt", TEXT))]
        for name, content in [*good[:2], *SAMPLES[kind], *good[2:]]:
            info = tarfile.TarInfo(name)
            if content == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))

    call("embed", model, tmp_path / "a.tar", "--out", tmp_path / "features", "--precision", "float32", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["features"], report["skipped"]) == (3 - len(expected(by_embed)), expected(by_embed))

    skipped = [reason for *_, reason in load_dataset(tmp_path / "a.tar").skipped]
    config = LoaderConfig(batch_size=3 - len(skipped), workers=0)
    loader = Loader([SourceConfig(path=tmp_path / "a.tar")], config, 32, Tokenizer.clip())
    skipped += sorted({reason for _, reason in loader.read_batch(loader.position).skipped})
    assert dict.fromkeys(skipped, 1) == expected(by_train)


@pytest.mark.parametrize("kind", LINES)
def test_a_line_of_a_text_file(kind, model, tmp_path, capsys):
    (by_embed,) = TABLES["Lines of a text file"][kind]
    (tmp_path / "a.txt").write_bytes(b"one\n" + LINES[kind] + b"\nthree\n")
    call("embed", model, tmp_path / "a.txt", "--out", tmp_path / "features", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["features"], report["skipped"]) == (3 - len(expected(by_embed)), expected(by_embed))


@pytest.mark.parametrize(("row", "what", "content"), [(row, *one) for row in ARGUMENTS for one in ARGUMENTS[row]])
def test_an_argument(row, what, content, model, tmp_path, capsys):
    place, out = tmp_path / f"bad{SUFFIX.get(what, '.txt')}", tmp_path / "out"
    embed = ["embed", model, tmp_path / "set", "--out", out, "--precision", "float32"]
    lay(tmp_path / "set", "b.jpg", JPEG)
    if ours := "/" in what or what == "manifest.json":
        call(*embed)
        place = out / what
    if isinstance(content, int):
        with open(place, "wb") as file:
            file.truncate(content)
    elif content == "pipe":
        os.mkfifo(place)
    elif content == "folder":
        place.mkdir()
    else:
        place.write_bytes(content)  # type: ignore[arg-type]
    evaluate = ["evaluate", "--model", model, "--suite", place, "--out", out]
    lists = ["curate", "queries", "--out", out, "--processes", "0"]
    commands = {
        "labels": ["classify", tmp_path / "set", "--labels", f"@{place}", "--model", model],
        "toml": evaluate,
        "csv": evaluate,
        "texts": ["embed", model, place, "--out", out],
        "keys": ["curate", "delete", tmp_path / "set", "--from", place],
        "list": [*lists, "--lists", place],
        "corpus": [*lists, "--corpus", place],
        "pageviews": [*lists, "--pageviews", place],
    }
    if what == "queries":  # read by those who match, in processes of their own
        with pytest.raises(DiptychError, match=r"bad\.parquet"):
            read_queries(place)
        return
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in (embed if ours else commands[what])])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("diptych: ")]
    (said,) = TABLES["Arguments"][row]
    if ended.value.code == 2:
        assert "one line" in said
        assert len(lines) == 1
        assert ours or place.name in lines[0]
    elif what == "csv":
        assert ended.value.code == 1
        assert place.name in printed.err + printed.out
    else:
        assert (ended.value.code or 0) == 0
        assert "passed over" in said or "made anew" in said
