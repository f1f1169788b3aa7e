"""Tables, lists and folders that nobody would write: they give what they hold, to the last row, or our errors."""

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate.queries.lists import read_list
from diptych.embed.bulk.inputs import open_inputs
from diptych.embed.sources import Row, fetch
from diptych.errors import DiptychError, PictureError
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Place
from diptych.evaluate.datasets.samples import Samples
from samples import draw, encode

PICTURE = encode(draw("red", "dot"))
PLACES = (
    "a.png",
    "gone.png",
    "",
    "../out.png",
    "/abs.png",
    "a\0b.png",
    "https://x.org/a.png",
    ".",
    "x" * 5000,
    "é.png",
)
WORDS = ("cat", "1", "1.0", "-1", "nan", "", " ", '["a", "b"]', "[1]", "[[]]", "a|b", "|", '"', "a\nb", "\0", "9" * 30)
cells = st.one_of(st.sampled_from(PLACES), st.sampled_from(WORDS), st.text(max_size=8))
few = settings(max_examples=40, deadline=None)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a.png").write_bytes(PICTURE)
        yield Path(name)


def read_all(rows: Iterator[Row]) -> int:
    """How many rows there are, each with a content or with a reason."""
    count = 0
    for row in rows:
        count += 1
        try:
            assert isinstance(fetch(row), bytes | str)
        except PictureError:
            continue
    return count


def opened(path: Path, kind: str) -> Samples | None:
    try:
        return open_samples(Place(), path, "test", kind)  # type: ignore[arg-type]
    except DiptychError:
        return None


# --- CSV ---

headers = st.lists(st.sampled_from(["image", "label", "captions", "split", "x", " image ", ""]), max_size=5)
tables = st.tuples(
    st.one_of(headers, *[st.just(["image", "label"])] * 3),
    st.lists(st.lists(cells, max_size=4), max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["single", "multi", "captions", "frames"]),
)


@few
@given(tables)
def test_any_csv_is_counted_to_the_last_row_or_refused(table):
    header, rows, delimiter, encoding, quoting, kind = table
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerows([header, *(row for row in rows if row)])
    with folder() as place:
        file = place / ("test.tsv" if delimiter == "\t" else "test.csv")
        file.write_bytes(text.getvalue().encode(encoding, "replace"))
        samples = opened(file, kind)
        if samples is None:
            return
        assert read_all(samples.rows.read(range(len(samples)))) == len(samples)
        if kind != "captions" and "split" not in header:
            assert len(samples) + samples.skipped.total() == sum(bool(row) for row in rows)


@few
@given(st.binary(max_size=300), st.sampled_from(["test.csv", "test.tsv", "test.parquet", "test.tar"]))
def test_any_bytes_are_read_or_refused(data, name):
    with folder() as place:
        (place / name).write_bytes(b"image,label\n" * (name != "test.tar") + data)
        opened(place / name, "single")


def test_a_cell_beyond_all_measure_is_counted(tmp_path):
    (tmp_path / "test.csv").write_text(f"image,label\na.png,cat\nb.png,{'x' * 2_000_000}\nc.png,dog\n")
    samples = opened(tmp_path / "test.csv", "single")
    assert (samples.labels, samples.skipped) == (["cat", "dog"], {"bad_row": 1})


# --- Parquet ---


def columns_of(length: int) -> st.SearchStrategy[pa.Array]:
    """Columns of any type that pictures, labels and captions come in, with gaps."""

    def some(values: st.SearchStrategy, dtype: pa.DataType) -> st.SearchStrategy[pa.Array]:
        lists = st.lists(st.one_of(st.none(), values), min_size=length, max_size=length)
        return lists.map(lambda found: pa.array(found, dtype))

    data = st.one_of(st.binary(max_size=6), st.just(PICTURE))
    strings = [some(cells, dtype) for dtype in (pa.string(), pa.large_string(), pa.string_view())]
    return st.one_of(
        *strings,
        strings[0].map(lambda column: column.dictionary_encode()),
        *(some(data, dtype) for dtype in (pa.binary(), pa.large_binary(), pa.binary_view())),
        some(st.binary(min_size=3, max_size=3), pa.binary(3)),
        some(st.integers(-3, 5), pa.int64()),
        some(st.floats(width=32), pa.float64()),
        some(st.booleans(), pa.bool_()),
        some(st.lists(st.integers(0, 255), max_size=4), pa.list_(pa.uint8())),
        some(st.lists(st.one_of(st.none(), cells), max_size=3), pa.list_(pa.string())),
        some(
            st.fixed_dictionaries({"bytes": st.one_of(st.none(), data), "path": st.one_of(st.none(), cells)}),
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        some(st.binary(max_size=6), pa.binary()).map(lambda c: pa.Array.from_buffers(pa.string(), len(c), c.buffers())),
    )


pairs = st.integers(0, 6).flatmap(lambda length: st.tuples(columns_of(length), columns_of(length)))
NAMES = st.sampled_from([("image", "label"), ("image", "captions"), ("image", "image"), ("a:b", "label"), ("x", "y")])


@few
@given(pairs, NAMES, st.sampled_from(["single", "multi", "captions"]))
def test_any_parquet_is_counted_to_the_last_row_or_refused(pair, names, kind):
    with folder() as place:
        file = place / "test.parquet"
        pq.write_table(pa.Table.from_arrays(list(pair), names=list(names)), file, row_group_size=2)
        if (samples := opened(file, kind)) is not None:
            assert read_all(samples.rows.read(range(len(samples)))) == len(samples)
            assert len(samples) + samples.skipped.total() == len(pair[0])
        for wanted in (None, "image", "text"):
            with contextlib.suppress(DiptychError):
                (source,) = open_inputs([f"{file}:{names[0]}"], wanted)
                assert read_all(source.read(0, source.rows)) == source.rows == len(pair[0])


# --- lists of queries ---


@few
@given(
    st.lists(st.one_of(cells, st.integers(), st.none()), max_size=6),
    st.sampled_from(["json", "jsonl", "tsv", "txt"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    st.booleans(),
)
def test_any_list_of_queries_is_read_line_by_line_or_refused(values, suffix, encoding, packed):
    written = json.dumps(values) if suffix == "json" else "\n".join(
        json.dumps(value) if suffix == "jsonl" else str(value) for value in values
    )  # fmt: skip
    data = written.encode(encoding, "replace")
    with folder() as place:
        name = place / f"list.{suffix}{'.gz' * packed}"
        name.write_bytes(gzip.compress(data) if packed else data)
        try:
            found = list(read_list(str(name)))
        except DiptychError:
            return
        assert all(isinstance(query, str) for query in found)
        lines = len(values) if suffix == "json" else len(data.split(b"\n")) - (not data or data.endswith(b"\n"))
        assert len(found) == lines


# --- class folders ---

names = st.sampled_from(
    ["a.png", "B.JPG", "c.jpeg", "x.TIFF", ".hidden.png", "._a.png", "Thumbs.db", "notes.txt", "no suffix", "d.png.bak"]
)
kinds = st.sampled_from(["file", "file", "file", "link", "dangling", "pipe", "folder"])
trees = st.dictionaries(
    st.sampled_from(["cat", "dog", "001.Owl", ".git", "__MACOSX", "train", "Test", "empty", "é"]),
    st.dictionaries(st.tuples(st.sampled_from(["", "sub", ".cache", "sub/__MACOSX"]), names), kinds, max_size=6),
    max_size=5,
)


def build(place: Path, tree: dict) -> int:
    """Lay a tree; how many of its files are neither hidden nor in folders that are."""
    seen = 0
    for label, files in tree.items():
        (place / label).mkdir()
        for (below, name), kind in files.items():
            path = place / label / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "file":
                path.write_bytes(PICTURE)
            else:
                path.symlink_to(place.parent / "a.png" if kind == "link" else "nowhere")
            parts = (label, *below.split("/"), name)
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
            seen += kind != "folder" and not hidden
    return seen


@few
@given(trees)
def test_any_tree_of_class_folders_adds_up_or_is_refused(tree):
    with folder() as place:
        (place / "set").mkdir()
        seen = build(place / "set", tree)
        if (samples := opened(place / "set", "single")) is None:
            return
        assert len(samples) + samples.passed_over.total() == seen
        assert read_all(samples.rows.read(range(len(samples)))) == len(samples)
        assert set(samples.classnames or ()) == {n for n in tree if not n.startswith(".") and n != "__MACOSX"}


def test_the_trees_and_tables_above_can_be_opened_at_all(tmp_path):
    """So that no invariant holds for want of anything that opens."""
    build(tmp_path, {"cat": {("", "a.png"): "file", ("sub", "B.JPG"): "pipe"}, "dog": {("", "notes.txt"): "file"}})
    samples = opened(tmp_path, "single")
    assert samples is not None
    assert (len(samples), samples.passed_over.total()) == (2, 1)
    with pytest.raises(PictureError, match="not_a_file"):
        fetch(next(samples.rows.read([1])))
