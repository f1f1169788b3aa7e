"""Fetched pairs to shards, in an order that does not depend on where a pair was found.

Every pair has a place in the order: a hash of (seed, key). A shard is a stretch of that order, so it needs pairs of all
parts. Two steps, so that no process holds more than a few shards and every picture is read and written twice:

    scatter   a task per part: its rows sorted by place, a row group for each task of the second step
    shards    a task per `shards_per_task` shards: collects its row groups of all parts, sorts, writes tars and indexes

A sample's JSON says where it came from: picture, page, queries, and the draw that admitted it. Keys that the folder's
tombstones name are not written again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from diptych import files
from diptych.curate.config import WriteConfig
from diptych.curate.rows import read_queries
from diptych.errors import NotFoundError, UsageError
from diptych.pair import Pair
from diptych.shards.dataset import DATASET_FILE, Dataset, describe
from diptych.shards.index import load_index
from diptych.shards.order import hash_positions
from diptych.shards.tombstones import DELETED, read_tombstones
from diptych.shards.write import shard_name, why_not, write_shard
from diptych.stage import folder as parts
from diptych.stage.folder import DROPPED, Manifest, TaskRecord
from diptych.stage.job import Job, Task
from diptych.stage.run import Engine, StageReport, tasks_of

SCATTER = "scatter"
"""Folder of the first step, inside that of the shards; it goes when they are finished."""
COMPACTED = "compacted"
"""In the manifest's settings: samples whose bytes were taken out after the shards were written."""


def run(config: WriteConfig, *, engine: Engine) -> StageReport:
    """Write the shards; raises UsageError if no pair is left to write."""
    source = parts.read_manifest(config.folder)
    described = parts.describe_config(config, config.out)
    compacted = _read_compacted(config.out, described, source.hash)
    if compacted is not None:
        return compacted
    sources = tasks_of(config.folder)
    cuts = _cut(config)
    scatter = Scatter(
        folder=config.out / SCATTER,
        settings=described,
        parent=source.hash,
        seed=config.seed,
        cuts=tuple(cuts.tolist()),
    )
    gather = Gather(
        folder=config.out,
        settings=described,
        parent=source.hash,
        config=config,
        inputs=tuple(scatter.folder / f"{task.name}.parquet" for task in sources),
    )

    def prepare(_: object) -> None:
        (config.out / DATASET_FILE).unlink(missing_ok=True)
        engine.run_job(scatter, sources)

    buckets = [Task(f"shards-{number:05d}", ()) for number in range(len(cuts) + 1)]
    report = engine.run_job(gather, buckets, prepare=prepare)
    names = [name for name in parts.read_manifest(config.out).files if name.endswith(".tar")]
    if not names:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in report.dropped.items())
        raise UsageError(f"no pair was left to write into {config.out}; dropped: {counts or 'none came'}")
    dataset = Dataset.from_indexes(config.out, [load_index(config.out / name) for name in sorted(names)])
    files.write_json(config.out / DATASET_FILE, describe(dataset))
    shutil.rmtree(scatter.folder, ignore_errors=True)
    return report


def _read_compacted(out: Path, described: Mapping[str, Any], parent: str) -> StageReport | None:
    """The report of shards that were compacted since; they are not written again, or what was deleted would be back."""
    try:
        manifest = parts.read_manifest(out)
    except NotFoundError:
        return None
    if COMPACTED not in manifest.config:
        return None
    if {**manifest.config, COMPACTED: 0} != {**described, COMPACTED: 0} or manifest.parent != parent:
        raise UsageError(
            f"samples were taken out of the shards in {out} for good, and they were made with other settings or "
            "inputs; name another folder, with a copy of tombstones.json in it if those samples shall stay deleted"
        )
    return _report(out, manifest)


def _report(out: Path, manifest: Manifest) -> StageReport:
    tars = sum(name.endswith(".tar") for name in manifest.files)
    return StageReport(
        stage=manifest.stage,
        folder=out,
        rows=manifest.rows,
        kept=manifest.kept,
        dropped=dict(manifest.dropped),
        done=0,
        found=tars,
        seconds=0.0,
        hash=manifest.hash,
    )


def places(keys: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """Where pairs stand in the order; drawn apart from what balancing draws of the same keys."""
    hashes = np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], dtype=np.uint64)
    return hash_positions(seed, hashes.view(np.int64), stream=2)


def _cut(config: WriteConfig) -> NDArray[np.uint64]:
    """The places at which the tasks of the second step begin, but for the first one."""
    batches = parts.read_rows(config.folder, ["key"])
    found = [places(batch.column("key").to_pylist(), config.seed) for batch in batches]
    every = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)
    size = config.samples_per_shard * config.shards_per_task
    return np.unique(every[size::size])


@dataclass(frozen=True, kw_only=True)
class Scatter(Job):
    """Job: one part, sorted by place; the metadata says which task each row group is for."""

    seed: int
    cuts: tuple[int, ...]

    def do(self, task: Task) -> TaskRecord:
        """Sort one part; it is held in memory."""
        table = pa.Table.from_batches(list(task.read()), schema=_schema_of(task))
        wide = pa.field("image", pa.large_binary())  # a binary column ends at 2 GiB
        table = table.cast(table.schema.set(table.schema.get_field_index("image"), wide))
        order = places(table["key"].to_pylist(), self.seed)
        rows = np.argsort(order, kind="stable")
        bounds = np.searchsorted(order[rows], np.array(self.cuts, dtype=np.uint64), side="left")
        groups = np.split(rows, bounds)
        filled = [number for number, group in enumerate(groups) if len(group)]
        name = f"{task.name}.parquet"
        with files.atomic_file(self.folder / name) as path:
            schema = table.schema.with_metadata({"groups": json.dumps(filled)})
            with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
                for number in filled:
                    writer.write_table(table.take(groups[number]).cast(schema), len(groups[number]))
            digest = files.sha256(path)
        return self.commit(task, kept=len(table), dropped={}, written={name: digest})


def _schema_of(task: Task) -> pa.Schema:
    return pq.read_schema(task.inputs[0]).remove_metadata()


@dataclass(frozen=True, kw_only=True)
class Gather(Job):
    """Job: a few shards, of what all parts have for them."""

    config: WriteConfig
    inputs: tuple[Path, ...]

    def do(self, task: Task) -> TaskRecord:
        """Write the shards of one task."""
        bucket = int(task.name.rpartition("-")[2])
        batches = [batch for path in self.inputs for batch in _read_group(path, bucket)]
        pairs, dropped = self._choose(batches)
        written: dict[str, str] = {}
        size, most = self.config.samples_per_shard, self.config.shards_per_task
        starts = range(0, min(len(pairs), size * most), size)
        for number, start in enumerate(starts):
            end = None if number == most - 1 else start + size  # pairs at the same place may make the last one larger
            path = self.folder / shard_name(bucket * most + number)
            write_shard([self._pair(batches, place) for place in pairs[start:end]], path)
            for file in (path, path.with_suffix(".arrow")):
                written[file.name] = files.sha256(file)
        name = f"dropped/{task.name}.parquet"
        with files.atomic_file(self.folder / name) as path:
            pq.write_table(pa.Table.from_pylist(dropped, schema=DROPPED), path, compression="zstd")
            written[name] = files.sha256(path)
        return self.commit(task, kept=len(pairs), dropped=Counter(row["reason"] for row in dropped), written=written)

    def _choose(self, batches: list[pa.RecordBatch]) -> tuple[list[tuple[int, int]], list[dict[str, str]]]:
        """(batch, row) of what is written, in order, and the rows that are not."""
        deleted = read_tombstones(self.folder)
        found: list[tuple[int, str, int, int]] = []
        for number, batch in enumerate(batches):
            keys = batch.column("key").to_pylist()
            order = places(keys, self.config.seed).tolist()
            found += [(order[row], key, number, row) for row, key in enumerate(keys)]
        taken: set[str] = set()
        chosen: list[tuple[int, int]] = []
        dropped: list[dict[str, str]] = []
        for _, key, number, row in sorted(found):
            pair = _row(batches[number], row)
            reason = DELETED if key in deleted else why_not(pair, taken)
            if reason:
                dropped.append(
                    {"key": key, "image_url": pair.image_url or "", "caption": pair.caption, "reason": reason}
                )
            else:
                taken.add(key)
                chosen.append((number, row))
        return chosen, dropped

    def _pair(self, batches: list[pa.RecordBatch], place: tuple[int, int]) -> Pair:
        """A pair with all that is known of where it came from in its details."""
        batch, row = batches[place[0]], place[1]
        pair = _row(batch, row)
        details = dict(pair.details)
        details |= {name: url for name, url in (("image_url", pair.image_url), ("page_url", pair.page_url)) if url}
        if "queries" in batch.schema.names:
            texts = _query_texts(self.config.queries)
            ids = batch.column("queries")[row].as_py() or []
            details["queries"] = json.dumps([texts[i] if texts else i for i in ids], ensure_ascii=False)
        if "query" in batch.schema.names and (query := batch.column("query")[row].as_py()) is not None:
            texts = _query_texts(self.config.queries)
            details["query"] = texts[query] if texts else str(query)
        if "draw" in batch.schema.names and (draw := batch.column("draw")[row].as_py()) is not None:
            details["draw"] = repr(draw)
        return replace(pair, details=details)


def _read_group(path: Path, bucket: int) -> Iterator[pa.RecordBatch]:
    """The rows of one part for one task."""
    with parts.reading(path) as file:
        groups = json.loads((file.schema_arrow.metadata or {})[b"groups"])
        if bucket in groups:
            yield from file.iter_batches(1024, row_groups=[groups.index(bucket)])


def _row(batch: pa.RecordBatch, row: int) -> Pair:
    names = ("key", "caption", "image", "image_url", "page_url", "details")
    values = {name: batch.column(name)[row].as_py() for name in names}
    return Pair(**{**values, "details": dict(values["details"] or ())})


@lru_cache(maxsize=1)
def _query_texts(path: Path | None) -> tuple[str, ...]:
    """Texts of a list of queries by their number; none without a list."""
    if path is None:
        return ()
    return tuple(read_queries(path)["text"].to_pylist())
