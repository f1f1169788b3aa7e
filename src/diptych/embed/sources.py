"""The kinds of sources: what their rows are called and where the content of each lies.

Each has a `name` (the `source` of its features), a `kind`, its number of `rows`, a `fingerprint` that is equal as long
as the rows are the same, the samples that were `lost` on opening with their reasons, and how many files were
`passed_over`, by suffix, as no pictures.

`read(start, stop)` yields rows in order. A row says where its content is; `fetch`, called from many threads, brings it.
What cannot be used is a row with a reason, so that every row is accounted for.
"""

import base64
import binascii
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from diptych import files
from diptych.decode import read_file
from diptych.embed.config import InputKind
from diptych.errors import DatasetError, PictureError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, MAX_BYTES, find_format
from diptych.machine import read_at
from diptych.shards.index import is_metadata_of_macos, load_index, split_name
from diptych.shards.members import Damage, iter_members
from diptych.stage.job import Task

_COMPANIONS = frozenset({"txt", "json", "cls"})
"""Suffixes of the other members of a sample."""
READ_ROWS = 16
"""Rows of a Parquet file that are in memory at a time: few, since no file says how large its values become."""
_LOOKED_AT = 100
"""Values of a column of text that decide what it holds."""


@dataclass(frozen=True)
class Part(Task):
    """Rows [start, stop) of one source."""

    source: int = 0
    start: int = 0
    stop: int = 0


class Extent(NamedTuple):
    """A stretch of a file."""

    file: Path
    offset: int
    size: int
    xxh3: int | None
    """XXH3 of the content, if an index knows it."""


class Row(NamedTuple):
    """One input: where its content lies, or why it has none."""

    id: str
    content: bytes | str | Path | Extent | None
    reason: str = ""


def fetch(row: Row) -> bytes | str:
    """The content of a row; raises PictureError, whose reason is counted, if there is none."""
    match row.content:
        case None:
            raise PictureError(row.reason, row.id)
        case bytes() | str():
            return row.content
        case Path():
            return read_file(row.content)
        case Extent(file, offset, size, xxh3):
            data = _read_extent(file, offset, size)
            if xxh3 is not None and xxhash.xxh3_64_intdigest(data) != xxh3:
                raise PictureError("changed", f"not the bytes that {file.name} was indexed with")
            return data


def _read_extent(file: Path, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise PictureError("too_many_bytes", f"{size:,} bytes at {offset} of {file}, at most {MAX_BYTES:,}")
    try:
        with open(file, "rb") as handle:
            return read_at(handle.fileno(), size, offset)
    except FileNotFoundError:
        raise PictureError("missing", f"no such file: {file}") from None
    except OSError as error:
        raise PictureError("unreadable", f"{file}: {error.strerror}") from None


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Files, each a picture."""

    name: str
    root: Path
    files: tuple[str, ...]
    """Relative to the root."""
    fingerprint: str
    passed_over: dict[str, int] = field(default_factory=dict)
    kind: InputKind = "image"
    lost: tuple[tuple[str, str], ...] = ()

    @classmethod
    def open(
        cls, name: str, root: Path, files: tuple[str, ...], passed_over: Counter[str] | None = None
    ) -> "PictureSource":
        digest = xxhash.xxh3_128()
        for file in files:
            digest.update(f"{_printable(file)}\0{stamp(root / file)}\0".encode())
        others = dict(sorted((passed_over or {}).items()))
        return cls(name=name, root=root, files=files, fingerprint=digest.hexdigest(), passed_over=others)

    @property
    def rows(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        for file in self.files[start:stop]:
            yield Row(_printable(Path(file).as_posix()), self.root / file)


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """Samples of one tar: their pictures, or their captions."""

    path: Path
    kind: InputKind
    fingerprint: str
    lost: tuple[tuple[str, str], ...]
    rows: int
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: Path, kind: InputKind) -> "ShardSource":
        fingerprint = xxhash.xxh3_128_hexdigest(f"{kind} {stamp(path)}".encode())
        if _is_indexed(path, kind):
            index = load_index(path)
            return cls(path=path, kind=kind, fingerprint=fingerprint, lost=index.skipped, rows=len(index))
        listed = list(_scan_pictures(path))
        lost = tuple(item for item in listed if isinstance(item, tuple) and not isinstance(item, Row))
        others = Counter(item for item in listed if isinstance(item, str))
        rows = len(listed) - len(lost) - others.total()
        return cls(path=path, kind=kind, fingerprint=fingerprint, lost=lost, rows=rows, passed_over=dict(others))

    def read(self, start: int, stop: int) -> Iterator[Row]:
        if not _is_indexed(self.path, self.kind):
            rows = [item for item in _scan_pictures(self.path) if isinstance(item, Row)]
            yield from rows[start:stop]
            return
        table = load_index(self.path).table.select(["key", "caption", "offset", "size", "xxh3"])
        for row in table.slice(start, stop - start).to_pylist():
            extent = Extent(self.path, row["offset"], row["size"], row["xxh3"])
            yield Row(row["key"], extent if self.kind == "image" else row["caption"])


def _is_indexed(path: Path, kind: InputKind) -> bool:
    """Captions need the index, pictures use the one that our own writer lays beside a shard."""
    return kind == "text" or path.with_suffix(".arrow").exists()


def _scan_pictures(path: Path) -> Iterator[Row | tuple[str, str] | str]:
    """Of any tar, the first picture of every key, whether or not it has a caption; (key, reason) of what is damaged or
    there twice; the suffix of each member that is taken for no part of a sample."""
    seen: set[str] = set()
    for item in iter_members(path):
        key, suffix = split_name(item.name)
        if isinstance(item, Damage):
            yield key or f"@{item.offset}", item.reason
        elif is_metadata_of_macos(item.name):
            continue
        elif f".{suffix}" in IMAGE_SUFFIXES:
            if key in seen:
                yield key, "duplicate_key"
            else:
                seen.add(key)
                yield Row(key, Extent(path, item.offset, item.size, None))
        elif suffix not in _COMPANIONS:
            yield f".{suffix}" if suffix else ""


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """One column of a Parquet file."""

    path: Path
    column: str
    holds: Literal["bytes", "struct", "paths", "base64", "texts"]
    fingerprint: str
    rows: int
    lost: tuple[tuple[str, str], ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, column: str, holds: str, rows: int) -> "ParquetSource":
        fingerprint = xxhash.xxh3_128_hexdigest(f"{column}\0{holds}\0{stamp(path)}".encode())
        return cls(path=path, column=column, holds=holds, fingerprint=fingerprint, rows=rows)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return f"{self.path}:{self.column}"

    @property
    def kind(self) -> InputKind:
        return "text" if self.holds == "texts" else "image"

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Only the row groups of the range are read, and of them only this column; DatasetError for damage."""
        try:
            yield from self._read(start, stop)
        except (pa.ArrowException, OSError) as error:
            said = f"{self.path} is damaged ({str(error).splitlines()[0][:100]}); fetch or write it again"
            raise DatasetError(said) from None

    def _read(self, start: int, stop: int) -> Iterator[Row]:
        with pq.ParquetFile(self.path) as file:
            first, groups, before = None, [], 0
            for number in range(file.num_row_groups):
                behind = before + file.metadata.row_group(number).num_rows
                if behind > start and before < stop:
                    first = before if first is None else first
                    groups.append(number)
                before = behind
            row = first or 0
            for batch in file.iter_batches(READ_ROWS, row_groups=groups, columns=[self.column]):
                if row + len(batch) > start and row < stop:
                    for i, value in enumerate(read_values(batch.column(self.column)), row):
                        if start <= i < stop:
                            yield self._row(i, value)
                row += len(batch)
                if row >= stop:
                    return

    def _row(self, number: int, value: object) -> Row:
        if self.holds == "texts" and isinstance(value, str):
            return _text_row(number, value)
        if self.holds == "base64" and isinstance(value, str):
            data = decode_base64(value)
            return Row(str(number), data, "" if data is not None else "bad_base64")
        return locate_picture(str(number), value, self.path.parent)


def locate_picture(row_id: str, value: object, folder: Path) -> Row:
    """Where a picture lies that a table names: its bytes, a path relative to `folder`, or a struct of both."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    elif isinstance(value, list):  # of bytes, as Arrow's lists of uint8 come
        value = (
            None if None in value else bytes(value) if all(type(one) is int and 0 <= one < 256 for one in value) else ""
        )
    if value is None or isinstance(value, UnicodeDecodeError):
        return Row(row_id, None, "null" if value is None else "bad_text")
    if isinstance(value, bytes):
        return Row(row_id, value)
    if not isinstance(value, str) or not value:
        return Row(row_id, None, "no_image")
    if "://" in value:
        return Row(row_id, None, "url")  # nothing is fetched here; `diptych curate fetch` does that
    if leaves_folder(value):
        return Row(row_id, None, "outside_folder")
    return Row(row_id, folder / value)


def pictures_of_type(dtype: pa.DataType) -> Literal["bytes", "struct", "paths"] | None:
    """How a column of this type holds pictures, if it can: paths are any strings. None if it cannot."""
    kinds = pa.types
    if kinds.is_dictionary(dtype):
        return pictures_of_type(dtype.value_type)
    if kinds.is_struct(dtype):  # as Hugging Face datasets keep pictures
        return "struct" if dtype.get_field_index("bytes") >= 0 else None
    if kinds.is_list(dtype) or kinds.is_large_list(dtype) or kinds.is_list_view(dtype):
        return "bytes" if kinds.is_uint8(dtype.value_type) else None
    if kinds.is_binary(dtype) or kinds.is_large_binary(dtype) or kinds.is_binary_view(dtype):
        return "bytes"
    if kinds.is_fixed_size_binary(dtype):
        return "bytes"
    strings = kinds.is_string(dtype) or kinds.is_large_string(dtype) or kinds.is_string_view(dtype)
    return "paths" if strings else None


def first_texts(file: pq.ParquetFile, column: str) -> list[str]:
    """The first values of a column of strings that are not empty."""
    batches = file.iter_batches(_LOOKED_AT, columns=[column])
    values = (value for batch in batches for value in read_values(batch.column(column)))
    return list(itertools.islice((value for value in values if value and isinstance(value, str)), _LOOKED_AT))


def are_base64(values: list[str]) -> bool:
    """Whether any of these is a picture, written as text: no caption begins as one."""
    heads = [decode_base64(value.partition(";base64,")[2] or value, 64) for value in values]
    return any(head is not None and find_format(head) for head in heads)


def decode_base64(text: str, size: int | None = None) -> bytes | None:
    """The bytes (of the first `size` signs) of base64 or of a data: URL; None for what is none."""
    try:
        return base64.b64decode((text.partition(";base64,")[2] or text)[:size], validate=size is None)
    except (binascii.Error, ValueError):
        return None


def read_values(column: pa.Array) -> Iterator[object]:
    """Values of a column; the error for each text that is not UTF-8, which Parquet does not forbid."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for scalar in column:
            try:
                yield scalar.as_py()
            except UnicodeDecodeError as error:
                yield error


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A text file, one text a line."""

    path: Path
    fingerprint: str
    rows: int
    kind: InputKind = "text"
    lost: tuple[tuple[str, str], ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: Path) -> "TextSource":
        digest, rows = xxhash.xxh3_128(), 0
        with open(path, "rb") as file:
            head = file.read(2)
            if head in (b"\xff\xfe", b"\xfe\xff"):
                raise UsageError(f"{path} is UTF-16; save it as UTF-8")
            file.seek(0)
            while part := file.read(files.MAX_LINE):
                digest.update(part)
            file.seek(0)
            rows = sum(1 for _ in files.iter_lines(file))
        return cls(path=path, fingerprint=digest.hexdigest(), rows=rows)

    def read(self, start: int, stop: int) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(files.iter_lines(file)):
                if number >= stop:
                    return
                if number < start:
                    continue
                if line is None:
                    yield Row(str(number), None, "text_too_large")
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 0 else "utf-8")
                except UnicodeDecodeError:
                    yield Row(str(number), None, "bad_text")
                else:
                    yield _text_row(number, text.rstrip("\r\n"))


def leaves_folder(path: str | Path) -> bool:
    """Whether a relative path climbs out of the folder of the table that names it."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir


Source = PictureSource | ShardSource | ParquetSource | TextSource


def format_dropped(source: str, dropped: Iterable[tuple[str, str]]) -> bytes:
    """Lines of JSON that name what was left out and why."""
    entries = ({"source": source, "id": row_id, "reason": reason} for row_id, reason in dropped)
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def _text_row(number: int, text: str) -> Row:
    return Row(str(number), text) if text.strip() else Row(str(number), None, "empty")


def _printable(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stamp(file: Path) -> str:
    """Size and time of change, by which content is known without reading it; both alike is taken for unchanged."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # a link that leads nowhere, a NUL: counted when it is read
        return "unreadable"
    return f"{status.st_size} {status.st_mtime_ns}"
