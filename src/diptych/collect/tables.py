"""Tables that are text: CSV with any separator, and lines of JSON. They are read in bounded memory, from any record on.

A record that cannot be read has a reason in place of values. A quote that is opened and never closed does not swallow
the records behind it: their lines are then read one by one, and quotes are characters like others.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diptych.errors import UsageError
from diptych.files import MAX_LINE, iter_lines, parse_json
from diptych.image_file import IMAGE_SUFFIXES
from diptych.shards.write import is_unicode

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
_LOOKED_AT = 100
"""Lines of JSON that tell which columns there are."""
csv.field_size_limit(MAX_LINE)


class Record(NamedTuple):
    """One record: what it says by column, or why it says nothing."""

    place: int
    """Byte at which it begins."""
    values: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class CsvTable:
    """Records of a CSV file with a header."""

    path: Path
    columns: tuple[str, ...]
    separator: str
    start: int
    """Byte at which the first record begins."""

    @classmethod
    def open(cls, path: Path) -> "CsvTable":
        """Read the header; UsageError for a file that has none."""
        with open(path, "rb") as file:
            head = file.readline(MAX_LINE)
            start = file.tell()
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UsageError(f"{path} is UTF-16; save it as UTF-8")
        try:
            line = head.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text; save it as CSV in UTF-8") from None
        separator = max(SEPARATORS, key=line.count)
        columns = tuple(
            name.strip() for name in next(csv.reader([line], delimiter=separator, skipinitialspace=True), ())
        )
        if any(name.startswith(("http://", "https://")) for name in columns):  # CC3M and CC12M have no header
            return cls(path, tuple(str(number) for number in range(1, len(columns) + 1)), separator, 0)
        if not any(columns) or not line.replace("\t", "").isprintable():
            raise UsageError(f"{path} has no header: its first line names no column")
        if any(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in columns):
            raise UsageError(f"{path} has no header, its first line names a picture; put one above, like image,caption")
        if len(set(columns)) < len(columns):
            raise UsageError(f"{path} has two columns of the same name: {', '.join(columns)}")
        return cls(path, columns, separator, start)

    @property
    def kind(self) -> str:
        return f"CSV with {SEPARATORS[self.separator]}"

    def read(self, place: int = 0) -> Iterator[Record]:
        """Records from the one on that begins at byte `place`."""
        with open(self.path, "rb") as file:
            file.seek(max(place, self.start))
            lines = _Lines(iter_lines(file))
            reader = csv.reader(lines, delimiter=self.separator, skipinitialspace=True)
            begin = file.tell()
            while True:
                lines.taken.clear()
                try:
                    fields = next(reader, None)
                except csv.Error:
                    fields = ()
                if fields is None and not lines.taken:
                    return
                if len(lines.taken) == 1 or self._holds_together(lines.taken):
                    if fields != []:  # an empty line
                        yield self._record(begin, fields or ())
                else:
                    yield from self._split(begin, lines.taken)
                begin = file.tell()

    def _record(self, place: int, fields: list[str] | tuple[str, ...]) -> Record:
        width = len(self.columns)
        if len(fields) < width or any(fields[width:]):
            return Record(place, None, "bad_row")
        values = dict(zip(self.columns, fields, strict=False))
        return Record(place, values) if is_unicode("".join(fields)) else Record(place, None, "bad_text")

    def _holds_together(self, lines: list[str]) -> bool:
        """Whether several lines are one record, and not some behind a quote that was left open."""
        try:
            (fields,) = csv.reader(lines, delimiter=self.separator, skipinitialspace=True, strict=True)
        except (csv.Error, ValueError):
            return False
        return len(fields) == len(self.columns) and not (self.separator == "\t" and any("\t" in one for one in fields))

    def _split(self, place: int, lines: list[str]) -> Iterator[Record]:
        for line in lines:
            fields = line.rstrip("\r\n").split(self.separator)
            if any(fields):
                yield self._record(place, fields)
            place += len(line.encode("utf-8", "surrogateescape"))


class _Lines:
    """Lines as text, and which ones were taken; bytes that are no UTF-8 become halves of surrogate pairs."""

    def __init__(self, lines: Iterator[bytes | None]) -> None:
        self._lines, self.taken = lines, list[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = (next(self._lines) or b"\0").decode("utf-8", "surrogateescape")  # too long: no record
        self.taken.append(line)
        return line


@dataclass(frozen=True)
class JsonLines:
    """Records of a file with a JSON object on each line."""

    path: Path
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> "JsonLines":
        """Look at the first lines for the columns that there are."""
        columns: dict[str, None] = {}
        for _, record in zip(range(_LOOKED_AT), cls(path, ()).read(), strict=False):
            columns |= dict.fromkeys(record.values or ())
        if not columns:
            raise UsageError(f"{path} has no JSON object on its first lines")
        return cls(path, tuple(columns))

    @property
    def kind(self) -> str:
        return "lines of JSON"

    def read(self, place: int = 0) -> Iterator[Record]:
        """Records from the one on that begins at byte `place`."""
        with open(self.path, "rb") as file:
            file.seek(place)
            begin = place
            for line in iter_lines(file):
                if line is None or line.strip():
                    yield _parse(begin, line)
                begin = file.tell()


def _parse(place: int, line: bytes | None) -> Record:
    if line is None:
        return Record(place, None, "text_too_large")
    try:
        values = parse_json(line.decode("utf-8-sig"))
    except ValueError:
        return Record(place, None, "bad_row")
    if not isinstance(values, dict):
        return Record(place, None, "bad_row")
    half = b"\\u" in line and not is_unicode(json.dumps(values, ensure_ascii=False))
    return Record(place, None, "bad_text") if half else Record(place, values)


Table = CsvTable | JsonLines


def open_table(path: Path) -> Table:
    """A table by its content: lines of JSON if the first one is an object, else CSV."""
    with open(path, "rb") as file:
        first = next(iter_lines(file), b"") or b""
    try:
        if isinstance(json.loads(first.decode("utf-8-sig")), dict):
            return JsonLines.open(path)
    except (ValueError, RecursionError):
        pass
    return CsvTable.open(path)
