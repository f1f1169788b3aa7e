"""A split of a dataset, opened: keys, labels, and where each picture lies. Nothing here imports torch."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from diptych.embed.sources import Extent, ParquetSource, Row, stamp
from diptych.evaluate.datasets.registry import DatasetKind

Label = int | str | tuple[int, ...] | tuple[str, ...]
"""A class by number or name; several of them; or captions."""
NUMBER = re.compile(r"(-?)(0|[1-9][0-9]{0,8})(\.0+)?", re.ASCII)
"""The number of a class, written out: as it is, or as a program writes it that takes it for a float."""


@dataclass
class Samples:
    """One split of a dataset, opened."""

    path: Path
    layout: str
    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    rows: "Rows" = field(default_factory=lambda: ListedRows([]))
    classnames: tuple[str, ...] | None = None
    """Names of the classes at the source, in the order of its numbers; None if it gives none."""
    templates: tuple[str, ...] | None = None
    """Templates that lie beside the images."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> samples without a usable label."""
    damage: list[tuple[str, str]] = field(default_factory=list)
    """Damaged and missing parts: the reason of each (none if no sample is lost by it), and a message."""
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Neighbours of each anchor, where samples are frames."""
    imagenet_groups: tuple[tuple[int, ...], ...] = ()
    """For each of `classnames` the classes of ImageNet that it covers, if the source says."""
    odd_label: str = ""
    """A label that is none, and its type."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Suffix -> files that were not taken for pictures."""
    folds: tuple[tuple[int, ...], ...] = ()
    """Parts of a train split that its authors train on one after the other, by place among the samples."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal keys, labels, class names, and sizes and times of the files that the pictures lie in. Asked
        for once it is whole."""
        digest = xxhash.xxh3_128()
        folds = (self.folds,) if self.folds else ()
        for part in (self.classnames, self.templates, self.sets, *folds, *zip(self.keys, self.labels, strict=True)):
            digest.update(f"{part!r}\n".encode("utf-8", "surrogatepass"))
        for file in self.rows.list_files():
            digest.update(f"{stamp(file)}\n".encode())
        return digest.hexdigest()

    def skip_label(self, value: Any, kind: object) -> None:
        """Count a sample that has no label, or one that is none; the first is kept for a message."""
        missing = value is None or value != value or (isinstance(value, str) and not value.strip())
        self.skipped["no_label" if missing else "bad_label"] += 1
        if not missing and not self.odd_label:
            self.odd_label = f"{repr(value)[:60]} ({kind})"


@dataclass
class ListedRows:
    """Where every picture lies: a file, or a stretch of one."""

    rows: list[Row]

    def read(self, wanted: Sequence[int]) -> Iterator[Row]:
        return (self.rows[i] for i in wanted)

    def list_files(self) -> list[Path]:
        """Where the pictures lie, each file once."""
        places = (row.content for row in self.rows)
        found = (place.file if isinstance(place, Extent) else place for place in places)
        return list(dict.fromkeys(place for place in found if isinstance(place, Path)))


@dataclass
class ColumnRows:
    """Pictures of a column, in several files one behind the other."""

    files: list[ParquetSource]
    kept: list[int]
    """Rows of all files together that are samples."""

    def read(self, wanted: Sequence[int]) -> Iterator[Row]:
        """In rising order: every file is read once."""
        missing = iter([self.kept[i] for i in wanted])
        row, before = next(missing, None), 0
        for file in self.files:
            if row is not None and row < before + file.rows:
                for number, found in enumerate(file.read(row - before, file.rows), row):
                    if number == row:
                        yield found
                        if (row := next(missing, None)) is None or row >= before + file.rows:
                            break
            before += file.rows

    def list_files(self) -> list[Path]:
        """Where the pictures lie."""
        return [file.path for file in self.files]


Rows = ListedRows | ColumnRows


def plain_label(value: Any, kind: DatasetKind, classes: int) -> Label | None:
    """A label of a table: numbers, names, lists of them."""
    if kind == "captions":
        captions = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        kept = tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())
        return kept or None
    if kind == "multi":
        several = tuple(plain_class(one, classes) for one in value) if isinstance(value, list | tuple) else (None,)
        return None if None in several else several  # type: ignore[return-value]
    return plain_class(value, classes)


def plain_class(value: Any, classes: int) -> int | str | None:
    """The number or the name of a class, whatever type it has: True is 1, and so is 1.0, which a column of integers
    becomes where one is missing. None for what is neither, or no number below `classes` if these are known."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.strip() or None
    if not isinstance(value, int | float | Decimal) or not 0 <= value < 10**9 or value != int(value):
        return None
    return int(value) if not classes or value < classes else None
