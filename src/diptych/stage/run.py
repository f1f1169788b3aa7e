"""Runs the tasks of a folder: each is done once, whatever is killed in between.

    work/match/
      manifest.json                what it is begun with: stage, settings, the parent's hash; at the end also counts,
                                   files and its own hash
      part-00000.parquet           the rows that stay
      dropped/part-00000.parquet   addresses, caption, details and reason of those that do not
      done/part-00000.json         written last: counts, SHA-256 of both files, a fingerprint of settings and inputs

The tasks decide which files there are and what is in them; an engine only decides where and when a task runs. So any
number of processes, on one machine or many, leaves the same bytes. A task with a valid record in `done` is never done
again; one whose files are not those of its record is. Two runs of the same inputs have the same hash: no clock, no
absolute path and no number of processes goes into a manifest. `diptych embed` works in the same way, on files of its
own (`diptych.embed.bulk.job`).
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from diptych import files
from diptych.errors import NotFoundError, UsageError
from diptych.machine import count_cores
from diptych.stage import folder as parts
from diptych.stage.config import EngineConfig, EngineKind
from diptych.stage.engines import LocalWorker, RayWorker, WorkerPool, connect_ray
from diptych.stage.folder import TaskRecord
from diptych.stage.job import Job, Stage, StageJob, Task

OnTask = Callable[[str, TaskRecord, int, int], None]
"""Told the stage, the record of a task, how many tasks are done, and of how many, after each."""


def part_name(number: int) -> str:
    """Name of a task and of the part that it becomes."""
    return f"part-{number:05d}"


def tasks_of(folder: Path) -> list[Task]:
    """One task per part of a finished stage."""
    return [Task(part_name(i), (path,)) for i, path in enumerate(parts.part_paths(folder))]


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What a stage did."""

    stage: str
    folder: Path
    rows: int
    """Rows that came in, or were made of what came in."""
    kept: int
    dropped: dict[str, int]
    """Reason -> rows."""
    done: int
    """Tasks done by this run."""
    found: int
    """Tasks that an earlier run had done."""
    seconds: float
    hash: str
    """SHA-256 of the manifest."""


def _one_by_one(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    return ([task] for task in tasks)


@dataclass(kw_only=True)
class Engine:
    """Where tasks run, who is told, and what becomes of a folder that was begun with other settings.

    As a context its processes serve one stage after the other; else they end with each.
    """

    kind: EngineKind = "local"
    processes: int = 0
    """Tasks at once; 0: in this process, or by Ray one a core of the cluster."""
    redo: bool = False
    """Make a folder anew that was begun with other settings or inputs; else it is refused."""
    on_task: OnTask | None = None
    batches: Callable[[Sequence[Task]], Iterable[Sequence[Task]]] = _one_by_one
    """Tasks as they are handed out: a worker is given a batch at a time."""
    resources: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    """What Ray gives each worker."""
    _pool: WorkerPool | None = field(default=None, init=False, repr=False)

    @classmethod
    def open(cls, config: EngineConfig, on_task: OnTask | None = None) -> "Engine":
        """The engine that settings describe."""
        processes = config.processes or (count_cores() if config.engine == "local" else 0)
        return cls(kind=config.engine, processes=processes, redo=config.redo, on_task=on_task)

    def __enter__(self) -> "Engine":
        self._pool = WorkerPool(LocalWorker)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        self._pool.close()
        self._pool = None

    def run_stage(
        self,
        stage: Stage,
        tasks: Sequence[Task],
        folder: Path,
        config: object,
        *,
        schema: pa.Schema,
        parent: str | None = None,
    ) -> StageReport:
        """Do the tasks that are not done yet and write the manifest; the folder's name is the stage's.

        `config` is a dataclass or a mapping of what decides the outcome, `schema` that of the rows that stay, `parent`
        the hash of the manifest of what is read.
        """
        described = parts.describe_config(config, folder)
        job = StageJob(run=stage, folder=folder, schema=schema, settings=described, parent=parent)
        return self.run_job(job, tasks)

    def run_job(
        self,
        job: Job,
        tasks: Sequence[Task],
        *,
        prepare: Callable[[Mapping[str, TaskRecord]], object] | None = None,
        hold: bool = True,
    ) -> StageReport:
        """`run_stage` for a job of one's own.

        `prepare` is called with the records of what is done, if there is anything to do, before it is done. With
        `hold=False` the caller holds the folder.
        """
        began = time.monotonic()
        _check_tasks(tasks)
        with files.hold_folder(job.folder) if hold else contextlib.nullcontext():
            _remove_leftovers(job.folder)
            found = _find_done(job, tasks, self.redo)
            missing = [task for task in tasks if task.name not in found]
            done = dict(found)
            if missing:
                parts.begin_manifest(job.folder, job.describe())  # before all else: by it the folder is known as ours
                for part in ("done", "dropped"):
                    (job.folder / part).mkdir(exist_ok=True)
                if prepare is not None:
                    prepare(found)
                for name, record in self._do(job, missing):
                    done[name] = record
                    if self.on_task is not None:
                        self.on_task(job.stage, record, len(done), len(tasks))
                _remove_leftovers(job.folder)  # of processes that died
            manifest = parts.write_manifest(job.folder, **job.describe(), done=[done[task.name] for task in tasks])
        return StageReport(
            stage=job.stage,
            folder=job.folder,
            rows=manifest.rows,
            kept=manifest.kept,
            dropped=dict(manifest.dropped),
            done=len(missing),
            found=len(found),
            seconds=time.monotonic() - began,
            hash=manifest.hash,
        )

    def _do(self, job: Job, tasks: Sequence[Task]) -> Generator[tuple[str, TaskRecord]]:
        """Do tasks in any order; yields each as it is done."""
        batches = self.batches(tasks)
        if self.kind == "local" and self.processes == 0:
            for batch in batches:
                with contextlib.closing(job(batch)) as records:
                    yield from ((task.name, record) for record, task in zip(records, batch, strict=True))
        elif self.kind == "local" and self._pool is not None:
            yield from self._pool.run(job, batches, self.processes)
        else:
            start, width = LocalWorker, self.processes
            if self.kind == "ray":
                ray = connect_ray(self.processes)
                start = partial(RayWorker, ray, ray.put(job), self.resources)
                width = width or max(1, int(ray.cluster_resources().get("CPU", 1)))
            with contextlib.closing(WorkerPool(start)) as pool:
                yield from pool.run(job, batches, width)


def _remove_leftovers(folder: Path) -> None:
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        files.remove_leftovers(part)


def _check_tasks(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise UsageError("there is nothing to do: no input was named or found")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("two tasks have the same name")
    for task in tasks:
        for path in task.inputs:
            if isinstance(path, Path) and not path.exists():
                raise NotFoundError(f"no such file: {path}")


def _find_done(job: Job, tasks: Sequence[Task], redo: bool) -> dict[str, TaskRecord]:
    """The tasks that need not be done again; raises UsageError if the folder was made with other settings."""
    recorded = {task.name: parts.read_done(job.folder, task.name) for task in tasks}
    names = {path.stem for path in (job.folder / "done").glob("*.json")}
    stale = names - recorded.keys()
    for task in tasks:
        done = recorded[task.name]
        if done is not None and done.fingerprint != job.fingerprint_of(task):
            stale.add(task.name)
    if stale and not redo:
        then = parts.read_begun(job.folder)
        different = job.find_difference(then, job.describe()) if then is not None else None
        different = different or f"other settings or inputs ({len(stale)} of its parts)"
        raise UsageError(f"{job.folder} was begun with {different}; {job.REMEDY}")
    for name in stale:
        old = parts.read_done(job.folder, name)
        for path in (f"done/{name}.json", *(old.files if old is not None else ())):
            (job.folder / path).unlink(missing_ok=True)
    current = {name: done for name, done in recorded.items() if done is not None and name not in stale}
    with ThreadPoolExecutor(count_cores()) as pool:
        whole = list(pool.map(lambda done: parts.is_whole(job.folder, done), current.values()))
    return {
        name: done for (name, done), good in zip(current.items(), whole, strict=True) if good and job.is_final(done)
    }
