"""The files of a stage's folder: parts as Parquet, a commit record for each, one manifest for all.

The same rows give the same bytes, and every page of a part carries a checksum, so that a damaged one is noticed by
whoever reads it.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.errors import NotFoundError, ShardError, UsageError

REASON = pa.field("reason", pa.string())

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 2
"""Version of the folder's layout and of what stages make of their rows; other versions are rebuilt."""
HEADER: dict[str, Any] = {"format": "diptych stage", "version": MANIFEST_VERSION}
"""How every manifest begins."""
READ_ROWS = 1024
"""Rows of a batch that a stage is given."""
GROUP_ROWS = 16384
"""Rows of a row group that is written ..."""
GROUP_BYTES = 64 << 20
"""... or fewer, if they take more than this."""
DROPPED = pa.schema(
    [*(pa.field(name, pa.string()) for name in ("key", "image_url", "page_url", "caption", "details")), REASON]
)
"""What is kept of a row that is dropped."""


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The record of a task that is done."""

    fingerprint: str
    """Fingerprint of the settings and the inputs it was done with."""
    rows: int
    kept: int
    dropped: dict[str, int]
    """Reason -> rows."""
    files: dict[str, str]
    """Name in the folder -> SHA-256."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished folder says of itself; what it was begun with is written first, without the counts and files."""

    stage: str
    config: Mapping[str, Any]
    parent: str | None
    rows: int
    kept: int
    dropped: Mapping[str, int]
    files: Mapping[str, str]
    hash: str = field(default="")
    """SHA-256 of all the rest."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a part and hold its pages to their checksums; raises ShardError if it is damaged."""
    files.require_file(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {path}; run the stage that writes {path.parent} again") from None
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path} is damaged ({error}); run the stage that wrote it again, it replaces it") from None


def read_part(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of one part, in batches of up to READ_ROWS."""
    with reading(path) as file:
        yield from file.iter_batches(READ_ROWS, columns=list(columns) if columns is not None else None)


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The kept rows of a finished stage, part by part."""
    for path in part_paths(folder):
        yield from read_part(path, columns)


def part_paths(folder: Path) -> list[Path]:
    """The parts of a finished stage, in order."""
    return [folder / name for name in read_manifest(folder).files if "/" not in name and name.endswith(".parquet")]


class PartWriter:
    """Splits what a stage yields into the rows that stay and the rows that do not, and writes both."""

    def __init__(self, kept: Path, dropped: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.counts: Counter[str | None] = Counter()
        self._outcome = schema.append(REASON)
        self._kept, self._dropped = _RowGroups(kept, schema), _RowGroups(dropped, DROPPED)

    def write(self, batch: pa.RecordBatch) -> None:
        """Take one batch of a stage; raises ValueError if its columns are not those the stage promised."""
        if batch.schema.names != self._outcome.names or batch.schema.types != self._outcome.types:
            raise ValueError(f"the stage yields the columns\n{batch.schema}\nand not, as it promised,\n{self._outcome}")
        reasons = batch.column("reason")
        self.counts.update(reasons.to_pylist())
        self._kept.write(batch.filter(reasons.is_null()).select(self.schema.names))
        dropped = batch.filter(reasons.is_valid())
        columns = [
            dropped.column(one.name) if one.name in dropped.schema.names else pa.nulls(dropped.num_rows, one.type)
            for one in DROPPED
        ]
        self._dropped.write(pa.RecordBatch.from_arrays(columns, schema=DROPPED))

    def close(self) -> None:
        """Write what is still held."""
        self._kept.close()
        self._dropped.close()


class _RowGroups:
    """A Parquet file whose row groups do not depend on how its rows came."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._waiting = schema, list[pa.RecordBatch]()
        self._rows = self._bytes = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._waiting.append(pa.RecordBatch.from_arrays(batch.columns, schema=self._schema))
            self._rows += batch.num_rows
            self._bytes += batch.nbytes
        if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=self._rows)
        self._waiting, self._rows, self._bytes = [], 0, 0


def read_done(folder: Path, name: str) -> TaskRecord | None:
    """The record of a task; None if it is not done. A record that cannot be read counts as none."""
    try:
        done = TaskRecord(**files.read_json(folder / "done" / f"{name}.json"))
        inside = all((folder / file).resolve().is_relative_to(folder.resolve()) for file in done.files)
        counts = (done.rows, done.kept, *done.dropped.values())
        counted = all(type(one) is int for one in counts) and done.rows == done.kept + sum(done.dropped.values())
        named = all(isinstance(one, str) for one in (done.fingerprint, *done.files.values()))
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
    return done if inside and counted and named else None


def write_done(folder: Path, name: str, done: TaskRecord) -> None:
    """Commit a task: from here on it is done."""
    files.write_json(folder / "done" / f"{name}.json", asdict(done))


def is_whole(folder: Path, done: TaskRecord) -> bool:
    """Whether the files of a task are those of its record."""
    return all((folder / name).is_file() and files.sha256(folder / name) == hash for name, hash in done.files.items())


def describe_config(config: object, folder: Path) -> dict[str, Any]:
    """Settings as plain values that mean the same on another machine.

    A path becomes its last part, with the SHA-256 of a file or the manifest's hash of a stage's folder; the folder that
    is written is left out.
    """
    described = _describe(config, folder)
    if not isinstance(described, dict):
        raise TypeError(f"{config!r} is neither a dataclass nor a mapping")
    return described


def _describe(value: object, folder: Path) -> Any:
    if isinstance(value, Path):
        return _describe_path(value)
    if is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        return {name: _describe(one, folder) for name, one in value.items() if one != folder}
    if isinstance(value, (tuple, list)):
        return [_describe(one, folder) for one in value]
    return value


def _describe_path(path: Path) -> dict[str, str]:
    if path.is_file():
        return {"file": path.name, "sha256": files.sha256(path)}
    if (path / MANIFEST_FILE).exists():
        return {"folder": path.name, "hash": read_manifest(path).hash}
    return {"folder": path.name}


def fingerprint(stage: str, config: Mapping[str, Any], parent: str | None) -> str:
    """What a task depends on besides its own inputs: the stage, its settings and what is read."""
    return hash_json({"stage": stage, "config": config, "parent": parent, "version": MANIFEST_VERSION})


def hash_json(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def begin_manifest(folder: Path, begun: Mapping[str, Any]) -> None:
    """Write what a folder is begun with: stage, config and parent. Until `write_manifest` it is not finished."""
    files.write_json(folder / MANIFEST_FILE, HEADER | dict(begun))


def read_begun(folder: Path) -> dict[str, Any] | None:
    """Stage, config and parent of a folder, finished or not; None without a manifest of this version."""
    try:
        content = files.read_json(folder / MANIFEST_FILE)
        if any(content[name] != value for name, value in HEADER.items()):
            return None
        return {name: content[name] for name in ("stage", "config", "parent")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_difference(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first setting that differs, with both values; None if all are equal."""
    for name in sorted(then.keys() | now.keys()):
        there, here = then.get(name), now.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            if inner := find_difference(there, here, f"{prefix}{name}."):
                return inner
        elif there != here:
            return f"there {prefix}{name} is {there}, here {here}"
    return None


def write_manifest(
    folder: Path, *, stage: str, config: Mapping[str, Any], parent: str | None, done: Iterable[TaskRecord]
) -> Manifest:
    """Add up the records of all tasks; the folder is finished."""
    rows = kept = 0
    dropped: Counter[str] = Counter()
    parts: dict[str, str] = {}
    for one in done:
        rows, kept = rows + one.rows, kept + one.kept
        dropped.update(one.dropped)
        parts.update(one.files)
    manifest = Manifest(
        stage=stage,
        config=config,
        parent=parent,
        rows=rows,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        files=parts,
    )
    return save_manifest(folder, manifest)


def save_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest with its hash."""
    content = HEADER | asdict(manifest)
    del content["hash"]
    digest = hash_json(content)
    files.write_json(folder / MANIFEST_FILE, content | {"hash": digest})
    return replace(manifest, hash=digest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a stage's manifest; raises NotFoundError if the stage is not finished."""
    path = folder / MANIFEST_FILE
    try:
        content = files.read_json(path)
        if "hash" not in content and read_begun(folder) is not None:
            raise NotFoundError(f"{folder} is not finished; start the command that writes it again, and it goes on")
        digest = content.pop("hash")
        if hash_json(content) != digest:
            raise ShardError(f"{path} was changed after it was written: its hash is another; run the stage again")
        if any(content.pop(name) != value for name, value in HEADER.items()):
            raise ShardError(f"{path} has another format version; run the stage again with this version")
        manifest = Manifest(**content, hash=digest)
        if outside := next((name for name in manifest.files if os.path.isabs(name) or ".." in Path(name).parts), None):
            raise ShardError(f"{path} names {outside!r}, which is not in its folder; it is not what a stage wrote")
        return manifest
    except NotFoundError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        said = f"{folder} holds no finished stage: no {MANIFEST_FILE}"
        if folder.is_file() or any(folder.glob("*.parquet")):
            raise NotFoundError(
                f"{said}, so its tables are not from `diptych curate`; every stage reads the folder that the one "
                "before it wrote, and the first is `diptych curate crawl`, of lists of addresses `diptych curate links`"
            ) from None
        raise NotFoundError(f"{said}; run that stage first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise ShardError(f"{path} is damaged ({error!r}); run the stage again") from None
