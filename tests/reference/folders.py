"""Folders as a stage leaves them, made of rows at hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.curate.rows import with_reason
from diptych.pair import Pair, to_batch
from diptych.stage.job import Task
from diptych.stage.run import Engine, part_name


@dataclass(frozen=True)
class KeepAll:
    """Stage: drops nothing."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield with_reason(batch, [None] * batch.num_rows)


def make_stage(
    folder: Path, parts: Sequence[Sequence[Pair]], schema: pa.Schema, queries: dict[str, list[int]] | None = None
) -> Path:
    """Write a finished stage; with `queries` (key -> ids) the rows are matched ones."""
    raw = folder.with_name(f"{folder.name}-raw")
    raw.mkdir(parents=True)
    tasks = []
    for number, pairs in enumerate(parts):
        batch = to_batch(pairs)
        if queries is not None:
            ids = [queries[pair.key] for pair in pairs]
            batch = batch.append_column("queries", pa.array(ids, pa.list_(pa.int32())))
        path = raw / f"{part_name(number)}.parquet"
        pq.write_table(pa.Table.from_batches([batch], schema=schema), path, write_page_checksum=True)
        tasks.append(Task(part_name(number), (path,)))
    Engine().run_stage(KeepAll(), tasks, folder, {}, schema=schema)
    return folder
