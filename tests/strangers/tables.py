"""Tables and lists: CSV, Parquet, TOML, class lists, archives of pages; spoilt at random and by what they claim."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from strangers.case import Case, World, damage_bytes, refused_or_right
from strangers.places import PLACES, embed
from strangers.world import EVALUATE, JPEG, copy

KIND = "tables"
CSV = {
    "no header": b"set/a/red.jpg,a\n",
    "a NUL": b"image,label\nset/a/red.jpg,\0\n",
    "a cell of 1 MB": b"image,label\nset/a/red.jpg," + b"x" * (1 << 20) + b"\n",
    "a quote without an end": b'image,label\nset/a/red.jpg,"a\n',
    "too many cells": b"image,label\n" + b"a," * 5000 + b"\n",
    "too few cells": b"image,label\nx\n",
    "a column twice": b"image,image,label\na,b,c\n",
    "paths out": b"image,label\n../../../etc/passwd,a\n/etc/passwd,b\nset/a/red.jpg,a\nset/b/blue.jpg,b\n",
    "a NUL in a path": b'image,label\n"a\0b",a\n',
    "addresses": b"image,label\nhttp://127.0.0.1/x.jpg,a\nfile:///etc/passwd,b\nset/a/red.jpg,a\n",
    "UTF-16": "image,label\n".encode("utf-16"),
    "latin": b"image,label\nset/a/red.jpg,caf\xe9\n",
    "a label of 5,000 digits": b"image,label\nset/a/red.jpg," + b"9" * 5000 + b"\n",
    "labels of escapes": b"image,label\nset/a/red.jpg,\x1b[2J\nset/b/blue.jpg,b\n",
    "labels of infinity": b"image,label\nset/a/red.jpg,inf\nset/b/blue.jpg,nan\n",
    "empty": b"",
    "50,000 columns": b",".join(b"c%d" % i for i in range(50_000)) + b"\n",
}
TOML = {
    "no data": b"",
    "no TOML": b"[[[[",
    "deep": b"a = " + b"[" * 100_000,
    "a key twice": b"[data]\npath='set'\npath='set'\n",
    "a path out": b"[data]\npath='../../../etc'\n",
    "a pipe of a shell": b"[data]\npath='pipe:touch started'\n",
    "an address": b"[data]\npath='http://127.0.0.1:1/x'\n",
    "a number": b"[data]\npath=5\n",
    "an unknown option": b"[data]\npath='set'\n'a\\u001b[2J'=1\n",
    "templates of one word": b"templates=['x']\n[data]\npath='set'\n",
    "templates that ask for more": b"templates=['{0.__class__} {}']\n[data]\npath='set'\n",
    "templates of widths": b"templates=['{:999999999}']\n[data]\npath='set'\n",
    "100,000 templates": b"templates=[" + b"'a {}'," * 100_000 + b"]\n[data]\npath='set'\n",
    "classes of escapes": b"classes=['\\u001b[2J','b']\n[data]\npath='set'\n",
    "classes that are too few": b"classes=['a']\n[data]\npath='set'\n",
    "a huge number": b"seed=" + b"9" * 5000 + b"\n[data]\npath='set'\n",
    "itself": b"datasets=['mine.toml']\n",
    "not UTF-8": b"[data]\npath='\xff'\n",
    "UTF-16": "[data]\npath='set'\n".encode("utf-16"),
    "NUL": b"[data]\npath='set'\n\0",
    "an infinite number": b"[data]\npath='set'\ntest=inf\n",
}
COLUMNS: dict[str, Callable[[], pa.Table]] = {
    "nulls": lambda: pa.table({"image": pa.nulls(3)}),
    "numbers": lambda: pa.table({"image": [1, 2]}),
    "lists": lambda: pa.table({"image": [[JPEG], []]}),
    "structs of nothing": lambda: pa.table({"image": [{"bytes": None, "path": None}, {"bytes": b"", "path": "../x"}]}),
    "structs of others": lambda: pa.table({"image": [{"a": 1}]}),
    "paths out": lambda: pa.table(
        {"image": ["../../x.jpg", "/etc/passwd.jpg", "a\0b.jpg", "http://127.0.0.1/x.jpg", "pipe:x.jpg"]}
    ),
    "texts of 2 MB": lambda: pa.table({"image": ["x" * (2 << 20)] * 3}),
    "texts of escapes": lambda: pa.table({"image": ["\x1b[2J\0", "\u202e"]}),
    "texts that are no UTF-8": lambda: pa.table(
        {
            "image": pa.Array.from_buffers(
                pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"\xff\xfe")]
            )
        }
    ),
    "a dictionary": lambda: pa.table({"image": pa.array([b"x", JPEG]).dictionary_encode()}),
    "no rows": lambda: pa.table({"image": pa.array([], pa.binary())}),
    "100,000 rows of nothing": lambda: pa.table({"image": [b""] * 100_000}),
}


def one_value_often() -> pa.Table:
    """1.2 GB of zeros in one group of rows, of which a megabyte is in the file, and in memory here."""
    places = pa.array([0] * 1200, pa.int32())
    return pa.table({"image": pa.DictionaryArray.from_arrays(places, [bytes(1 << 20)])})


SPOILT = [
    name for name, place in PLACES.items() if place.holds in ("parquet", "toml", "text", "warc", "arrow", "weights")
]


def iter_cases(world: World, seeds: int = 4) -> Iterator[Case]:
    place = PLACES["evaluate a CSV"]
    for name, data in CSV.items():
        yield Case(KIND, f"CSV: {name}", place.make(world, partial(_put, data)), check=refused_or_right)
    for name, data in TOML.items():
        build = PLACES["evaluate a suite"].make(world, partial(_put, data))
        yield Case(KIND, f"TOML: {name}", build, check=refused_or_right)
    for name, build in COLUMNS.items():
        yield Case(KIND, f"Parquet: {name}", partial(_column, world, build), check=refused_or_right)
    make = partial(_column, world, one_value_often, store_schema=False)
    yield Case(KIND, "Parquet: zeros that take no room", make, check=refused_or_right)
    for name in ("classnames.txt", "nshards.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"):
        for what, data in (
            ("empty", b""),
            ("a huge number", b"9" * 5000),
            ("10^12", b"1000000000000"),
            ("not UTF-8", b"\xff\xfe"),
            ("escapes", b"\x1b[2J\n\0"),
            ("negative", b"-1"),
            ("50 MB", b"x\n" * (25 << 20)),
        ):
            yield Case(KIND, f"{name}: {what}", partial(_wds, world, name, data), check=refused_or_right)
    for where in SPOILT:
        for seed in range(seeds):
            build = PLACES[where].make(world, partial(_spoil, f"{where} {seed}"))
            yield Case(KIND, f"{where}: random damage {seed}", build, check=refused_or_right)


def _put(data: bytes, path: Path, sound: bytes) -> None:
    path.write_bytes(data)


def _spoil(seed: str, path: Path, sound: bytes) -> None:
    path.write_bytes(damage_bytes(sound, random.Random(seed)))


def _column(world: World, build: Callable[[], pa.Table], folder: Path, *, store_schema: bool = True) -> list[str]:
    copy(world, folder, "model")
    pq.write_table(build(), folder / "t.parquet", compression="zstd", store_schema=store_schema)
    return embed("t.parquet:image")


def _wds(world: World, name: str, data: bytes, folder: Path) -> list[str]:
    copy(world, folder, "model", "foreign.tar")
    (folder / "set/test").mkdir(parents=True)
    (folder / "foreign.tar").rename(folder / "set/test/0.tar")
    (folder / "set/test/nshards.txt").write_text("1")
    (folder / ("set/test" if name == "nshards.txt" else "set") / name).write_bytes(data)
    (folder / "mine.toml").write_text("[data]\npath='set'\n")
    return EVALUATE
