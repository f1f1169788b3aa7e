"""Tables of pictures and labels: Parquet, also that of Hugging Face datasets, and CSV. Nothing here imports torch."""

import re
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.collect.tables import CsvTable
from diptych.embed.sources import ParquetSource, Row, find_content, leaves_folder
from diptych.errors import DatasetError, NotFoundError, UsageError
from diptych.evaluate.datasets.registry import DatasetKind, Place
from diptych.evaluate.datasets.samples import MAX_DIGITS, ColumnRows, Label, ListedRows, Samples, plain_label
from diptych.files import parse_json

_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})")


def open_parquet(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    samples = Samples(path, "parquet")
    files, kept, before = [], [], 0
    for file in _parquet_files(path, split):
        schema, rows = _read_schema(file)
        label = place.captions if kind == "captions" and place.captions in schema.names else place.label
        for column in (place.image, label):
            if column not in schema.names:
                raise DatasetError(f"{file} has no column {column!r}; it has {', '.join(schema.names)}")
        names = _class_label_names(schema, label)
        if files and names != samples.classnames:
            raise DatasetError(f"{file} names other classes than {files[0].path.name}")
        samples.classnames = names
        values = pq.read_table(file, columns=[label]).column(0).to_pylist()
        for row, value in enumerate(values, before):
            parsed = plain_label(value, kind, len(names or ()))
            if names and type(value) is int and value >= len(names):
                said = f"{file} has a label {value}, but names {len(names)} classes, 0 to {len(names) - 1}"
                samples.damage.append(("bad_label", said))
                continue
            if parsed is None:
                samples.skipped["no_label" if value is None else "bad_label"] += 1
                continue
            samples.keys.append(str(row))
            samples.labels.append(parsed)
            kept.append(row)
        files.append(ParquetSource.open(file, place.image, _holds(schema, place.image, file), rows))
        before += rows
    samples.rows = ColumnRows(files, kept)
    return samples


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
    for file in files:
        if match := _SHARD_OF.search(file.name):
            total = int(match[2])
            names = [file.with_name(_SHARD_OF.sub(f"-{i:05d}-of-{match[2]}", file.name)) for i in range(total)]
            if missing := [other.name for other in names if not other.is_file()]:
                raise DatasetError(f"{path} lacks {len(missing)} of {total} files of {split}: {missing[0]}")
    return files


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
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        feature = features[column]
        names = feature.get("names") or feature.get("feature", {}).get("names")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return tuple(map(str, names)) if names else None


def _holds(schema: pa.Schema, column: str, file: Path) -> str:
    kind = schema.field(column).type
    holds = find_content(kind)
    if holds is None:
        raise DatasetError(
            f"{file}: column {column} of type {kind} holds no pictures (bytes, paths, or a struct of both)"
        )
    return "paths" if holds == "strings" else holds


# --- CSV ---


def open_csv(path: Path, split: str, place: Place, kind: DatasetKind) -> Samples:
    file = path if path.is_file() else path / f"{split}.csv"
    if not file.is_file():
        others = sorted(path.glob("*.csv"))
        if len(others) != 1:
            raise NotFoundError(f"{path} has no {split}.csv")
        file = others[0]
    try:
        opened = CsvTable.open(file)
    except UsageError as error:
        raise DatasetError(str(error)) from None
    header, records = opened.columns, list(opened.read())
    table = [record.values for record in records if record.values is not None]
    label = place.captions if kind == "captions" and place.captions in header else place.label
    for column in (place.image, label):
        if column not in header:
            raise DatasetError(f"{file} has no column {column!r}; it has {', '.join(header)}")
    if "split" in header:
        table = [row for row in table if row["split"] == split]
    if ("split" in header and not table) or ("split" not in header and split != "test" and file.stem != split):
        raise NotFoundError(f"{file} has no split {split}")
    samples, rows = Samples(path, "csv"), []
    samples.skipped.update(record.reason for record in records if record.values is None)
    places: dict[str, int] = {}
    for row in table:
        picture, value = row[place.image] or "", (row[label] or "").strip()
        parsed = _csv_label(value, kind)
        if parsed is None or not picture:
            samples.skipped["no_label" if picture else "no_image"] += 1
        elif leaves_folder(picture):
            samples.skipped["outside_folder"] += 1
        elif kind == "captions" and picture in places:  # a line for every caption of a picture
            before = cast(tuple[str, ...], samples.labels[places[picture]])
            samples.labels[places[picture]] = (*before, *cast(tuple[str, ...], parsed))
        else:
            places[picture] = len(rows)
            samples.keys.append(picture)
            samples.labels.append(parsed)
            rows.append(Row(picture, file.parent / picture))
    samples.rows = ListedRows(rows)
    return samples


def _csv_label(value: str, kind: DatasetKind) -> Label | None:
    """A name, or a number; several of them with | between."""
    if not value and kind != "multi":
        return None
    if kind == "captions":
        return (value,)
    if kind == "multi":
        several = [_number_or_name(one.strip()) for one in value.split("|") if one.strip()]
        return tuple(several)  # type: ignore[return-value]
    return _number_or_name(value)


def _number_or_name(value: str) -> int | str:
    digits = value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS
    return int(value) if digits and str(int(value)) == value else value
