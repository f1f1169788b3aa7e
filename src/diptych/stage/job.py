"""Tasks and jobs of a resumable stage: a task becomes one part of a folder, a job does tasks.

A job is picklable and may be called in any process, with any tasks, as often as one likes: it leaves the same files.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from diptych import files
from diptych.stage.folder import PartWriter, TaskRecord, find_difference, fingerprint, hash_json, read_part, write_done

Stage = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
"""A picklable function from the rows of a task to those rows with a `reason`; most are frozen dataclasses."""


@dataclass(frozen=True)
class Task:
    """A piece of work that becomes one part."""

    name: str
    """Name of the task's files, without suffix: part-00000."""
    inputs: tuple[Path | str, ...]
    """What is read: parts of the stage before, or files that came from elsewhere; a string is a URL or another name."""
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is given. A subclass defines `do`, or `__call__` if neighbours are cheaper together."""

    folder: Path
    """Where its files go."""
    settings: Mapping[str, Any]
    """What decides the outcome, as plain values: the manifest's `config`."""
    parent: str | None = None
    """Hash of the manifest of what is read."""

    REMEDY: ClassVar[str] = "name another folder, or add --redo to make it anew"
    """Advice to who runs it in a folder that was begun with something else."""
    LIGHTER: ClassVar[str] = "Use fewer processes; else leave that input out"
    """Advice to who has too little memory for it."""

    @property
    def stage(self) -> str:
        """Name of what is done."""
        return self.folder.name

    def describe(self) -> dict[str, Any]:
        """What the manifest begins with, as JSON gives it back."""
        return json.loads(json.dumps({"stage": self.stage, "config": self.settings, "parent": self.parent}))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the stage, its settings and what is read."""
        return fingerprint(self.stage, self.settings, self.parent)

    def __call__(self, tasks: Sequence[Task]) -> Generator[TaskRecord]:
        """Do tasks, commit each, and yield its record."""
        for task in tasks:
            try:
                yield self.do(task)
            except Exception as error:
                error.add_note(f"in {task.name} of {self.stage}, which reads {', '.join(map(str, task.inputs))}")
                raise

    def do(self, task: Task) -> TaskRecord:
        """Do one task and commit it."""
        raise NotImplementedError

    def commit(self, task: Task, *, kept: int, dropped: Mapping[str, int], written: Mapping[str, str]) -> TaskRecord:
        """Write the record of a task: from here on it is done. `written` maps its files to their SHA-256."""
        record = TaskRecord(
            fingerprint=self.fingerprint_of(task),
            rows=kept + sum(dropped.values()),
            kept=kept,
            dropped=dict(sorted(dropped.items())),
            files=dict(written),
        )
        write_done(self.folder, task.name, record)
        return record

    def is_final(self, record: TaskRecord) -> bool:  # noqa: ARG002
        """Whether doing the task again would give the same; else the next start does it again."""
        return True

    def fingerprint_of(self, task: Task) -> str:
        """Fingerprint of everything that a task's outcome depends on."""
        return hash_json([self.fingerprint, task.name, task.describe()])

    def find_difference(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """What a folder was begun with and is not run with now; None if nothing of the manifest differs."""
        if then["stage"] != now["stage"]:
            return f"another stage: there {then['stage']}, here {now['stage']}"
        if different := find_difference(then["config"], now["config"]):
            return f"other settings: {different}"
        return "other inputs: the stage that it reads was run anew" if then["parent"] != now["parent"] else None


@dataclass(frozen=True, kw_only=True)
class StageJob(Job):
    """Gives a stage the rows of a task, and writes the rows that stay and those that do not."""

    run: Stage
    schema: pa.Schema

    def do(self, task: Task) -> TaskRecord:
        """Do one task and commit it."""
        names = [f"{task.name}.parquet", f"dropped/{task.name}.parquet"]
        with contextlib.ExitStack() as stack:
            kept, dropped = [stack.enter_context(files.atomic_file(self.folder / name)) for name in names]
            writer = PartWriter(kept, dropped, self.schema)
            counted = _Counted(task.read())
            for batch in self.run(iter(counted)):
                writer.write(batch)
            writer.close()
            rows = writer.counts.total()
            if task.rows and rows != counted.rows:
                raise ValueError(f"the stage was given {counted.rows} rows and gave back {rows}")
            hashes = [files.sha256(path) for path in (kept, dropped)]
        counts = {reason: count for reason, count in writer.counts.items() if reason is not None}
        return self.commit(
            task, kept=writer.counts[None], dropped=counts, written=dict(zip(names, hashes, strict=True))
        )


class _Counted:
    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self.rows, self._batches = 0, batches

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch
