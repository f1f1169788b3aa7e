"""A split of a dataset, opened: keys, labels, and where each picture lies. Nothing here imports torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from diptych.embed.sources import Extent, ParquetSource, Row, stamp
from diptych.evaluate.datasets.registry import DatasetKind

Label = int | str | tuple[int, ...] | tuple[str, ...]
"""A class by number or name; several of them; or captions."""
MAX_DIGITS = 9
"""Digits of a class's number; what has more is none."""


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
    if value is None:
        return None
    if kind == "captions":
        captions = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        kept = tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())
        return kept or None
    if kind == "multi":
        if not isinstance(value, list | tuple) or not all(_is_class(one, classes) for one in value):
            return None
        return tuple(value)
    return value if _is_class(value, classes) else None


def _is_class(value: Any, classes: int) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return type(value) is int and value >= 0 and (not classes or value < classes)
