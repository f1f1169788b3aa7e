"""What is done: a task, a piece of a stage's input that becomes one part, and a job, which does tasks.

A job is picklable and may be called in any process, with any task, as often as one likes: it leaves the same files.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa

from diptych import files
from diptych.stage import folder as parts
from diptych.stage.folder import PartWriter, TaskRecord, read_part

Stage = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""A picklable callable; most are frozen dataclasses. See the head of this module."""


@dataclass(frozen=True)
class Task:
    """A piece of work that becomes one part."""

    name: str
    """Name of the task's files, without suffix: part-00000."""
    inputs: tuple[Path | str, ...]
    """What is read: parts of the stage before, or files that came from elsewhere; a string is a URL."""
    rows: bool = True
    """Whether the inputs are Parquet files whose rows the stage is given; else it is given their paths, one row each in
    a column `path`."""

    def read(self) -> Iterator[pa.RecordBatch]:
        """What the stage is given."""
        if not self.rows:
            yield pa.record_batch({"path": pa.array(map(str, self.inputs), pa.string())})
            return
        for path in self.inputs:
            yield from read_part(Path(path))

    def describe(self) -> list[list[str | int]]:
        """Name and size of each input (a URL has no size); the content of parts is vouched for by the parent's hash."""
        return [[one, -1] if isinstance(one, str) else [one.name, one.stat().st_size] for one in self.inputs]


@runtime_checkable
class Job(Protocol):
    """What a worker is given."""

    @property
    def folder(self) -> Path:
        """Where its files go; its name is the name of what is done."""
        ...

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the settings and of what is read."""
        ...

    def __call__(self, task: Task) -> TaskRecord:
        """Do one task and commit it."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Gives a stage the rows of a task, and writes the rows that stay and those that do not."""

    stage: Stage
    folder: Path
    schema: pa.Schema
    fingerprint: str

    def __call__(self, task: Task) -> TaskRecord:
        """Do one task and commit it; in whatever process."""
        names = [f"{task.name}.parquet", f"dropped/{task.name}.parquet"]
        with contextlib.ExitStack() as stack:
            kept, dropped = [stack.enter_context(files.atomic_file(self.folder / name)) for name in names]
            writer = PartWriter(kept, dropped, self.schema)
            counted = _Counted(task.read())
            for batch in self.stage(iter(counted)):
                writer.write(batch)
            writer.close()
            rows = writer.counts.total()
            if task.rows and rows != counted.rows:
                raise ValueError(f"the stage was given {counted.rows} rows and gave back {rows}")
            hashes = [files.sha256(path) for path in (kept, dropped)]
        counts = {reason: count for reason, count in writer.counts.items() if reason is not None}
        done = TaskRecord(
            fingerprint=task_fingerprint(self.fingerprint, task),
            rows=rows,
            kept=writer.counts[None],
            dropped=dict(sorted(counts.items())),
            files=dict(zip(names, hashes, strict=True)),
        )
        parts.write_done(self.folder, task.name, done)
        return done


class _Counted:
    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self.rows, self._batches = 0, batches

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


def task_fingerprint(stage: str, task: Task) -> str:
    """What a task's outcome depends on."""
    return parts.hash_json([stage, task.name, task.describe()])
