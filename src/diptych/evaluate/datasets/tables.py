"""Tables of pictures and labels: Parquet, also that of Hugging Face datasets, CSV and JSON lines. Nothing here imports
torch."""

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.collect.tables import open_table
from diptych.embed.sources import (
    ParquetSource,
    Row,
    are_base64,
    first_texts,
    leaves_folder,
    pictures_of_type,
    read_values,
)
from diptych.errors import DatasetError, NotFoundError, UsageError
from diptych.evaluate.datasets.registry import DatasetKind, Place
from diptych.evaluate.datasets.samples import (
    NUMBER,
    ColumnRows,
    Label,
    ListedRows,
    Samples,
    plain_class,
    plain_label,
)

CSV_SUFFIXES = (".csv", ".tsv")
_NAN = "nan"
_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})")


def open_parquet(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    samples = Samples(path, "parquet")
    files, kept, before = [], [], 0
    for file in _parquet_files(path, split):
        schema, rows = _read_schema(file)
        label = place.captions if kind == "captions" and place.captions in schema.names else place.label
        check_columns(file, schema.names, place.image, label)
        names = _class_label_names(schema, label)
        if files and names != samples.classnames:
            raise DatasetError(f"{file} names other classes than {files[0].path.name}")
        samples.classnames = names
        for row, value in enumerate(_read_column(file, label), before):
            number = plain_class(value, 0) if names and kind == "single" else None
            if names and isinstance(number, int) and number >= len(names):
                said = f"{file} has a label {number}, but names {len(names)} classes, 0 to {len(names) - 1}"
                samples.damage.append(("bad_label", said))
                continue
            if (parsed := plain_label(value, kind, len(names or ()))) is None:
                samples.skip_label(value, f"column {label!r} of type {schema.field(label).type}")
                continue
            samples.keys.append(str(row))
            samples.labels.append(parsed)
            kept.append(row)
        files.append(ParquetSource.open(file, place.image, _holds(file, place.image), rows))
        before += rows
    samples.rows = ColumnRows(files, kept)
    return samples


def check_columns(file: Path, header: Sequence[str], *wanted: str) -> None:
    """Raise DatasetError unless a table has each of these columns once."""
    for column in wanted:
        if (count := header.count(column)) != 1:
            said = f"{count} columns {column!r}" if count else f"no column {column!r}"
            raise DatasetError(
                f"{file} has {said}; it has {', '.join(header)[:200]}: name them in [data] of a TOML, such as "
                f'label = "species" (docs/evaluate.md)'
            )


def _parquet_files(path: Path, split: str) -> list[Path]:
    """The files of a split, all of those that their names announce."""
    if path.is_file():
        return [path]
    everything = sorted(path.rglob("*.parquet"))
    files = [
        file
        for file in everything
        if re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.stem) or split in file.relative_to(path).parts[:-1]
    ]
    if not files:
        raise NotFoundError(f"{path} has no split {split}: no {split}*.parquet and no folder {split}")
    sets = {_set_of(file.relative_to(path), split): file for file in files}
    if len(sets) > 1 and any(is_whole for _, is_whole in sets):
        named = " and ".join(str(file.relative_to(path)) for file in [*sets.values()][:2])
        raise DatasetError(f"{path} has several tables of {split}: {named}; name the file or the folder of one")
    for file in files:
        if match := _SHARD_OF.search(file.name):
            total = int(match[2])
            names = [file.with_name(_SHARD_OF.sub(f"-{i:05d}-of-{match[2]}", file.name)) for i in range(total)]
            if missing := [other.name for other in names if not other.is_file()]:
                raise DatasetError(f"{path} lacks {len(missing)} of {total} files of {split}: {missing[0]}")
    return files


def _set_of(file: Path, split: str) -> tuple[str, bool]:
    """Which files of a split belong together, and whether they are all of it, by their name."""
    if split in (folders := file.parts[:-1]):
        return "/".join(folders[: folders.index(split)]), True
    parts = _SHARD_OF.search(file.stem)
    return f"{file.parent}/{_SHARD_OF.sub(parts[2], file.stem) if parts else ''}", bool(parts) or file.stem == split


def _read_schema(file: Path) -> tuple[pa.Schema, int]:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{file} is no whole Parquet file ({str(error).splitlines()[0][:100]}); fetch it again"
        ) from None


def _class_label_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names as Hugging Face datasets keep them in the schema."""
    try:
        features = files.parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        feature = features[column]
        names = feature.get("names") or feature.get("feature", {}).get("names")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return tuple(map(str, names)) if names else None


def _read_column(file: Path, column: str) -> Iterator[object]:
    try:
        for chunk in pq.read_table(file, columns=[column]).column(column).chunks:
            yield from read_values(chunk)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file} is damaged ({str(error).splitlines()[0][:100]}); fetch it again") from None


def _holds(file: Path, column: str) -> str:
    try:
        with pq.ParquetFile(file) as opened:
            kind = opened.schema_arrow.field(column).type
            holds = pictures_of_type(kind)
            if holds == "paths" and are_base64(first_texts(opened, column)):
                return "base64"
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file} is damaged ({str(error).splitlines()[0][:100]}); fetch it again") from None
    if holds is None:
        raise DatasetError(
            f"{file}: column {column} of type {kind} holds no pictures (bytes, paths, or a struct of both)"
        )
    return holds


# --- CSV, and JSON lines, whose values are taken as if they stood in a CSV ---


def open_csv(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    file = _table_of(path, split)
    try:
        opened = open_table(file)
        header, records = opened.columns, list(opened.read())
    except (UsageError, OSError) as error:
        raise DatasetError(str(error)) from None
    table = [_as_cells(record.values) for record in records if record.values is not None]
    label = place.captions if kind == "captions" and place.captions in header else place.label
    check_columns(file, header, place.image, label)
    if "split" in header:
        there = sorted({row["split"] for row in table if row["split"]})
        table = [row for row in table if (row["split"] or "").strip() == split]
        if not table:
            raise NotFoundError(f"{file} has no split {split}; its column `split` has {', '.join(there[:5])}")
    elif split != "test" and file.stem != split:
        raise NotFoundError(f"{file} has no split {split}")
    samples, rows = Samples(path, "csv"), []
    samples.skipped.update(record.reason for record in records if record.values is None)
    places: dict[str, int] = {}
    cells = [(row[label] or "").strip() for row in table]
    single_lines = [*cells, *(row[place.image] or "" for row in table)] if kind != "captions" else []
    if torn := next((one for one in single_lines if "\n" in one or "\r" in one), None):
        raise DatasetError(f"{file} has a cell of several lines, {torn[:40]!r}: a quote swallowed the lines behind it")
    numbers = kind != "captions" and _are_numbers(one for cell in cells for one in _several(cell, kind))
    for row, cell in zip(table, cells, strict=True):
        picture, parsed = row[place.image] or "", _csv_label(cell, kind, numbers=numbers)
        if not picture:
            samples.skipped["no_image"] += 1
        elif parsed is None:
            samples.skip_label(None if numbers and cell.lower() == _NAN else cell, f"column {label!r}")
        elif leaves_folder(picture):
            samples.skipped["outside_folder"] += 1
        elif (picture := os.path.normpath(picture)) in places and kind == "captions":  # a line for every caption
            before = cast(tuple[str, ...], samples.labels[places[picture]])
            samples.labels[places[picture]] = (*before, *cast(tuple[str, ...], parsed))
        else:
            places[picture] = len(rows)
            samples.keys.append(picture)
            samples.labels.append(parsed)
            rows.append(Row(picture, file.parent / picture))
    samples.rows = ListedRows(rows)
    return samples


def _table_of(path: Path, split: str) -> Path:
    """The table of a split: the file that is named, or is called so, or is the only one."""
    tables = sorted(file for suffix in CSV_SUFFIXES for file in path.glob(f"*{suffix}"))
    named = [path] if path.is_file() else [file for file in tables if file.stem == split] or tables
    if len(named) != 1:
        raise NotFoundError(f"{path} has no split {split}: no {split}.csv")
    return named[0]


def _as_cells(values: Mapping[str, Any]) -> dict[str, str]:
    """A row as a CSV has it: what is no text is written as JSON, what is not there is empty."""
    plain = {name: one if isinstance(one, str) else json.dumps(one) for name, one in values.items()}
    return defaultdict(str, {name: one for name, one in plain.items() if one != "null"})


def _several(cell: str, kind: DatasetKind) -> list[str]:
    """What a cell has: one, or where several may be those with | between, or a list in JSON."""
    if kind != "single" and cell.startswith("["):
        with contextlib.suppress(ValueError):
            listed = files.parse_json(cell)
            if isinstance(listed, list) and all(isinstance(one, str | int) for one in listed):
                return [str(one).strip() for one in listed if str(one).strip()]
    return [one.strip() for one in cell.split("|") if one.strip()] if kind == "multi" else [cell] if cell else []


def _are_numbers(values: Iterable[str]) -> bool:
    """Whether a column has numbers of classes: nothing else but what pandas writes where one is missing."""
    found = {value for value in values if value and value.lower() != _NAN}
    return bool(found) and all(NUMBER.fullmatch(value) for value in found)


def _csv_label(cell: str, kind: DatasetKind, *, numbers: bool) -> Label | None:
    several = _several(cell, kind)
    if kind == "captions":
        return tuple(several) or None
    parsed = [plain_class(float(one) if numbers else one, 0) for one in several]
    if None in parsed:
        return None
    return tuple(parsed) if kind == "multi" else next(iter(parsed), None)  # type: ignore[return-value]
