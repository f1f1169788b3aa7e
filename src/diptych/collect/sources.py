"""The kinds of sources of pairs, and how each is read: a picture's place, its captions, and what else is known.

Each has a `name`, a `fingerprint` that is equal as long as what it says is the same, one line that says what it was
taken for (`said`), and `ranges`, pieces that can be read on their own in bounded memory. What cannot be used is a
sample with a reason.
"""

import contextlib
import itertools
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from diptych.collect.tables import Record, Table
from diptych.embed.sources import READ_ROWS, Extent, Row, locate_picture, pictures_of_type, read_values, stamp
from diptych.errors import UsageError
from diptych.files import parse_json
from diptych.image_file import IMAGE_SUFFIXES
from diptych.shards.index import MAX_TEXT_BYTES, build_index
from diptych.shards.tombstones import DELETED, read_tombstones
from diptych.shards.write import is_unicode

CAPTION_NAMES = frozenset(
    {"caption", "captions", "text", "texts", "title", "description", "sentence", "sentences", "txt", "prompt", "alt"}
    | {"alt_text", "alttext"}
)
"""Columns and keys that are taken for captions, in lower case."""
_NUMBERED = re.compile(r"(.*?)[_ ]?\d+")
MAX_CAPTIONS = 1000
"""Neighbouring lines of a table that are put together as captions of the same picture, at most."""


class Sample(NamedTuple):
    """What a source has for one sample; without a picture, or a caption, the row has a reason."""

    row: Row
    captions: tuple[str, ...] = ()
    details: Mapping[str, Any] = {}


class PairSource(Protocol):
    """See the module."""

    @property
    def name(self) -> str:
        """What was given."""
        ...

    @property
    def said(self) -> str:
        """What it was taken for, and what it holds."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal as long as what it says is the same."""
        ...

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """Pieces [start, stop) that `read` takes."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """The samples of a piece."""
        ...


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what."""

    image: str
    captions: tuple[str, ...]

    def __str__(self) -> str:
        return f"pictures: {self.image}, captions: {', '.join(self.captions)}"


def choose_columns(
    name: str,
    columns: Sequence[str],
    first: Sequence[Mapping[str, Any]],
    image: str | None,
    captions: tuple[str, ...],
    *,
    links: bool = False,
) -> Columns:
    """The columns that were named, or the only ones that can be meant, by their first values and their names.

    With `links` the pictures are addresses. Raises UsageError if there is none, or more than one choice.
    """
    for given in (*captions, *([image] if image else [])):
        if given not in columns:
            raise UsageError(f"{name} has no column {given!r}; it has {', '.join(columns)}")
    if image is None:
        free = [one for one in columns if one not in captions]
        found = [one for one in free if _are(_is_encoded, first, one)] or [
            one for one in free if _are(_is_path, first, one)
        ]
        addresses = [one for one in free if _are(_is_link, first, one)]
        if links:
            found = _named(addresses, _LINK_NAMES) or addresses
            if not found:
                raise UsageError(f"{name} has no column of addresses; it has {', '.join(columns)}")
        elif addresses and not found:
            raise UsageError(
                f"{name} has addresses in {addresses[0]} and no pictures; `diptych curate links --inputs {name}` makes "
                "candidates of such a list, `diptych curate fetch` fetches them"
            )
        flag = "--url-column" if links else "--image-column"
        image = _choose_one(name, "pictures", found or _named(columns, _PICTURE_NAMES), columns, flag)
    if not captions:
        others = [one for one in columns if one != image]
        found = _named(others, CAPTION_NAMES) or [one for one in others if len(others) == 1]
        stems = {match[1] if (match := _NUMBERED.fullmatch(one)) else one for one in found}
        if len(stems) != 1:
            _choose_one(name, "captions", found, columns, "--caption-column")
        captions = tuple(found)
    return Columns(image, captions)


_PICTURE_NAMES = frozenset(
    {"image", "img", "picture", "filepath", "file_name", "filename", "image_path", "path", "file"}
)


_LINK_NAMES = frozenset({"url", "image_url", "img_url", "imageurl"})


def _choose_one(name: str, what: str, found: Sequence[str], columns: Sequence[str], flag: str) -> str:
    if len(found) == 1:
        return found[0]
    which = f"{', '.join(found)} may hold the {what}" if found else f"no column is known to hold {what}"
    raise UsageError(f"{name}: {which}; say which by {flag}. It has {', '.join(columns)}")


def _named(columns: Iterable[str], names: frozenset[str]) -> list[str]:
    def stem(column: str) -> str:
        match = _NUMBERED.fullmatch(column)
        return (match[1] if match else column).lower()

    return [column for column in columns if stem(column) in names]


def _are(test: Any, first: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [record.get(column) for record in first]
    values = [value for value in values if value not in (None, "")]
    return bool(values) and all(map(test, values))


def _is_encoded(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not _is_link(value) and value.lower().endswith(tuple(IMAGE_SUFFIXES))


def _is_link(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def make_sample(
    number: int, values: Mapping[str, Any], columns: Columns, folder: Path, texts: Sequence[Any] | None = None
) -> Sample:
    """The sample that a record tells of, or several records: then `texts` are the captions of all."""
    image = values.get(columns.image)
    row = locate_picture(image if isinstance(image, str) and image else str(number), image, folder)
    others = {name: value for name, value in values.items() if name not in columns.captions}
    captions = [values.get(name) for name in columns.captions] if texts is None else texts
    return add_text(row, captions, _details(others))


def add_text(row: Row, values: Sequence[Any], details: Mapping[str, Any]) -> Sample:
    """A picture with its captions, each a text or a list of texts; the reason if none can be used."""
    given = [one for value in values for one in (value if isinstance(value, list) else [value])]
    texts = [one.strip() for one in given if isinstance(one, str) and is_unicode(one)]
    captions = tuple(dict.fromkeys(text for text in texts if text))
    if row.reason or captions:
        return Sample(row, captions, details)
    bad = any(isinstance(one, UnicodeDecodeError) or (isinstance(one, str) and not is_unicode(one)) for one in given)
    return Sample(Row(row.id, None, "bad_text" if bad else "empty_caption" if texts else "no_caption"))


def _details(values: Mapping[str, Any]) -> dict[str, Any]:
    """What else is known, as far as JSON has words for it."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        with contextlib.suppress(RecursionError):  # of lists in lists in lists
            plain[name] = _plain(value)
    return {
        name: value
        for name, value in plain.items()
        if value is not None and value != "" and name not in ("", "caption")
    }


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_plain(one) for one in value]
        case dict():
            return value.get("path") if "bytes" in value else {str(name): _plain(one) for name, one in value.items()}
        case bytes() | UnicodeDecodeError():
            return None
    return str(value)  # a date, a decimal number


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """A CSV file or lines of JSON; neighbouring records of the same picture are one sample with several captions."""

    table: Table
    columns: Columns
    folder: Path
    marks: tuple[int, ...]
    """Bytes at which every `step`-th sample begins."""
    step: int
    samples: int
    fingerprint: str

    @classmethod
    def open(cls, table: Table, columns: Columns, folder: Path, step: int, *, stamps: bool) -> "TableSource":
        """Read it once for its marks; with `stamps` the pictures' sizes and times are part of the fingerprint."""
        digest = xxhash.xxh3_128(f"{stamp(table.path)} {columns} {folder}".encode("utf-8", "surrogatepass"))
        marks: list[int] = []
        samples = 0
        for records in _group(table.read(), columns.image):
            if samples % step == 0:
                marks.append(records[0].place)
            samples += 1
            image = (records[0].values or {}).get(columns.image)
            if stamps and isinstance(content := locate_picture("", image, folder).content, Path):
                digest.update(stamp(content).encode())
        return cls(
            table=table,
            columns=columns,
            folder=folder,
            marks=tuple(marks),
            step=step,
            samples=samples,
            fingerprint=digest.hexdigest(),
        )

    @property
    def name(self) -> str:
        return str(self.table.path)

    @property
    def said(self) -> str:
        elsewhere = f" below {self.folder}" if self.folder != self.table.path.parent else ""
        return f"{self.table.kind}, {self.samples:,} samples; {self.columns}{elsewhere}"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.step, self.samples)) for start in range(0, self.samples, self.step)]

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        groups = _group(self.table.read(self.marks[start // self.step]), self.columns.image)
        for number, records in enumerate(itertools.islice(groups, stop - start), start):
            if records[0].values is None:
                yield Sample(Row(str(number), None, records[0].reason))
                continue
            texts = [record.values.get(name) for record in records for name in self.columns.captions if record.values]
            yield make_sample(number, records[0].values, self.columns, self.folder, texts)


def _group(records: Iterable[Record], image: str) -> Iterator[list[Record]]:
    """Neighbours that name the same picture."""
    together: list[Record] = []
    before: object = None
    for record in records:
        here = record.values.get(image) if record.values else None
        if together and (not isinstance(here, str) or not here or here != before or len(together) == MAX_CAPTIONS):
            yield together
            together = []
        together.append(record)
        before = here
    if together:
        yield together


Listed = tuple[str, tuple[Any, ...] | None, Mapping[str, Any]]
"""Path of a picture, its captions (None: they are in the .txt beside it), and what else is known."""


@dataclass(frozen=True, kw_only=True)
class ListedSource:
    """Pictures that are listed beforehand: with a .txt beside each, or with captions that annotations have."""

    name: str
    kind: str
    folder: Path
    listed: "tuple[Listed, ...]"
    step: int
    fingerprint: str
    lines: bool = False

    @classmethod
    def open(
        cls, name: str, kind: str, folder: Path, listed: Iterable["Listed"], step: int, lines: bool = False
    ) -> "ListedSource":
        """Note the sizes and times of all files."""
        digest = xxhash.xxh3_128(f"{folder} {lines}".encode("utf-8", "surrogatepass"))
        entries = tuple(listed)
        for path, captions, details in entries:
            said = stamp((folder / path).with_suffix(".txt")) if captions is None else f"{captions} {details}"
            picture = locate_picture("", path, folder).content
            known = stamp(picture) if isinstance(picture, Path) else ""
            digest.update(f"{path}\0{known}\0{said}\0".encode("utf-8", "surrogatepass"))
        return cls(
            name=name, kind=kind, folder=folder, listed=entries, step=step, fingerprint=digest.hexdigest(), lines=lines
        )

    @property
    def said(self) -> str:
        return f"{self.kind}, {len(self.listed):,} samples"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.step, len(self.listed))) for start in range(0, len(self.listed), self.step)]

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        for path, captions, details in self.listed[start:stop]:
            row = locate_picture(path, path, self.folder)
            texts = self._read_text(path) if captions is None else captions
            yield Sample(Row(path, None, texts)) if isinstance(texts, str) else add_text(row, texts, _details(details))

    def _read_text(self, path: str) -> tuple[str, ...] | str:
        """The captions beside a picture, or the reason why there is none."""
        try:
            with open((self.folder / path).with_suffix(".txt"), "rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        except FileNotFoundError:
            return "no_caption"
        except OSError:
            return "unreadable"
        return _decode_text(data, self.lines)


def _decode_text(data: bytes, lines: bool) -> tuple[str, ...] | str:
    if len(data) > MAX_TEXT_BYTES:
        return "text_too_large"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "bad_text"
    return tuple(text.splitlines()) if lines and text.strip() else (text,)


@dataclass(frozen=True, kw_only=True)
class ParquetPairs:
    """Columns of a Parquet file; a piece is some row groups."""

    path: Path
    columns: Columns
    folder: Path
    groups: tuple[int, ...]
    """Rows before each row group, and of all."""
    step: int
    fingerprint: str
    cut: bool = False
    """Whether a row group may be cut: what is before a piece in it is read too."""

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def said(self) -> str:
        return f"Parquet, {self.groups[-1]:,} samples; {self.columns}"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        if self.cut:
            return [(start, min(start + self.step, self.groups[-1])) for start in range(0, self.groups[-1], self.step)]
        ends = [0]
        for end in self.groups[1:]:
            if end - ends[-1] >= self.step or end == self.groups[-1]:
                ends.append(end)
        return [(start, end) for start, end in itertools.pairwise(ends) if start < end]

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        with pq.ParquetFile(self.path) as file:
            spans = list(itertools.pairwise(self.groups))
            wanted = [number for number, (first, end) in enumerate(spans) if first < stop and end > start]
            names = wanted_columns(file.schema_arrow, self.columns)
            batches = file.iter_batches(READ_ROWS, row_groups=wanted, columns=names)
            piece = _slice(batches, spans[wanted[0]][0], start, stop)
            yield from read_batches(piece, start, self.columns, self.folder)


def _slice(batches: Iterable[pa.RecordBatch], row: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """The rows [start, stop) of batches that begin at `row`."""
    for batch in batches:
        first, end = max(start - row, 0), min(stop - row, batch.num_rows)
        if first < end:
            yield batch.slice(first, end - first)
        row += batch.num_rows
        if row >= stop:
            return


@dataclass(frozen=True, kw_only=True)
class ArrowPairs:
    """An Arrow file, as `save_to_disk` of Hugging Face's datasets leaves them; read in one piece."""

    path: Path
    columns: Columns
    folder: Path
    fingerprint: str
    ranges: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def said(self) -> str:
        return f"Arrow file; {self.columns}"

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        del start, stop
        with open_arrow(self.path) as (schema, batches):
            names = wanted_columns(schema, self.columns)
            parts = (part.select(names) for part in batches)
            small = (part.slice(i, READ_ROWS) for part in parts for i in range(0, part.num_rows, READ_ROWS))
            yield from read_batches(small, 0, self.columns, self.folder)


@contextlib.contextmanager
def open_arrow(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Schema and batches of an Arrow file, of the format for files or for streams; they stay where they are mapped."""
    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            with pa.ipc.open_file(mapped) as file:
                yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            mapped.seek(0)
            with pa.ipc.open_stream(mapped) as stream:
                yield stream.schema, iter(stream)


def wanted_columns(schema: pa.Schema, columns: Columns | None = None) -> list[str]:
    """All columns but those of other pictures."""
    heavy = ("bytes", "struct")
    chosen = columns.image if columns else None
    return [field.name for field in schema if field.name == chosen or pictures_of_type(field.type) not in heavy]


def read_batches(batches: Iterable[pa.RecordBatch], number: int, columns: Columns, folder: Path) -> Iterator[Sample]:
    """The samples of some rows, which are counted from `number` on."""
    for batch in batches:
        values = [list(read_values(column)) for column in batch.columns]
        for row in zip(*values, strict=True):
            yield make_sample(number, dict(zip(batch.schema.names, row, strict=True)), columns, folder)
            number += 1


@dataclass(frozen=True, kw_only=True)
class TarPairs:
    """A tar of samples by WebDataset's rule, compressed or not; read in one piece."""

    path: Path
    compression: str | None
    caption_key: str | None
    lines: bool
    fingerprint: str
    ranges: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def said(self) -> str:
        key = f"; captions: {self.caption_key} in the JSON" if self.caption_key else ""
        return f"tar{f' compressed by {self.compression}' if self.compression else ''}{key}"

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        del start, stop
        with self._decompressed() as tar:
            deleted = read_tombstones(self.path.parent)
            index = build_index(tar, captionless=True)
            for batch in index.table.to_batches(READ_ROWS):
                for row in batch.to_pylist():
                    if row["key"] in deleted:
                        yield Sample(Row(row["key"], None, DELETED))
                    else:
                        yield self._make_sample(row, Extent(tar, row["offset"], row["size"], row["xxh3"]))
        for key, reason in index.skipped:
            yield Sample(Row(key, None, reason))

    def _make_sample(self, row: Mapping[str, Any], place: Extent) -> Sample:
        details = parse_json(row["details"])
        text = row["caption"]
        found = [text.splitlines() if self.lines else text] if text else []
        if self.caption_key is not None:
            found = [details.pop(self.caption_key, None)]
        texts = [*found, details.pop("captions", None)]
        details.pop("caption", None)
        return add_text(Row(row["key"], place), texts, {"key": row["key"], **details})

    @contextlib.contextmanager
    def _decompressed(self) -> Iterator[Path]:
        if self.compression is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="diptych-") as folder:
            tar = Path(folder) / self.path.stem
            with open(tar, "wb") as plain, pa.input_stream(str(self.path), compression=self.compression) as compressed:
                while block := _read_block(compressed):
                    plain.write(block)
            yield tar


def _read_block(compressed: Any) -> bytes:
    """What comes next; nothing where it breaks off: what is there is then a tar that breaks off too."""
    try:
        return compressed.read(1 << 14)
    except OSError:
        return b""


AnySource = TableSource | ListedSource | ParquetPairs | ArrowPairs | TarPairs
