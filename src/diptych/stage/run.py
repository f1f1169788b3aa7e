"""Runs a stage over the files of a folder: a task per file, each done once, whatever is killed in between.

    work/match/
      part-00000.parquet           the rows that stay
      dropped/part-00000.parquet   key, image_url, caption and reason of those that do not
      done/part-00000.json         written last: counts, SHA-256 of both files, a fingerprint of settings and inputs
      manifest.json                when all tasks are done: settings, counts, files, the parent's hash, its own hash

The tasks decide which files there are and what is in them; an engine only decides where and when a task runs. So any
number of processes, on one machine or many, leaves the same bytes. A task with a valid record in `done` is never done
again; one whose files are not those of its record is. Two runs of the same inputs have the same hash: no clock, no
absolute path and no number of processes goes into a manifest.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from diptych import files
from diptych.errors import NotFoundError, RunLockedError, UsageError
from diptych.stage import folder as parts
from diptych.stage.config import Engine, EngineConfig
from diptych.stage.engines import WorkerPool, run_tasks
from diptych.stage.folder import MANIFEST_FILE, TaskRecord
from diptych.stage.job import Job, Stage, StageJob, Task, task_fingerprint

OnTask = Callable[[str, int, int], None]
"""Told the stage, how many of its tasks are done, and of how many, after each."""


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


@runtime_checkable
class Execute(Protocol):
    """What runs a stage: `run_stage` with an engine chosen by the caller."""

    def __call__(
        self,
        stage: Stage,
        tasks: Sequence[Task],
        folder: Path,
        config: object,
        *,
        schema: pa.Schema,
        parent: str | None = None,
    ) -> StageReport:
        """Run it."""
        ...


@runtime_checkable
class ExecuteJob(Protocol):
    """What runs a job: `tasks.run_job` with an engine chosen by the caller."""

    def __call__(
        self,
        job: Job,
        tasks: Sequence[Task],
        *,
        config: Mapping[str, Any],
        parent: str | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> StageReport:
        """Run it."""
        ...


def run_stage(
    stage: Stage,
    tasks: Sequence[Task],
    folder: Path,
    config: object,
    *,
    schema: pa.Schema,
    processes: int = 0,
    engine: Engine = "local",
    parent: str | None = None,
    redo: bool = False,
    on_task: OnTask | None = None,
    crew: WorkerPool | None = None,
) -> StageReport:
    """Do the tasks that are not done yet and write the manifest; the folder's name is the stage's.

    `config` is a dataclass or a mapping of what decides the outcome, `schema` that of the rows that stay, `parent` the
    hash of the manifest of what is read. `processes` 0 works in this process. A folder made with other settings is
    refused; with `redo` it is made anew.
    """
    described = parts.describe_config(config, folder)
    job = StageJob(
        stage=stage, folder=folder, schema=schema, fingerprint=parts.fingerprint(folder.name, described, parent)
    )
    return run_job(
        job,
        tasks,
        config=described,
        processes=processes,
        engine=engine,
        parent=parent,
        redo=redo,
        on_task=on_task,
        crew=crew,
    )


def run_job(
    job: Job,
    tasks: Sequence[Task],
    *,
    config: Mapping[str, Any],
    processes: int = 0,
    engine: Engine = "local",
    parent: str | None = None,
    redo: bool = False,
    on_task: OnTask | None = None,
    crew: WorkerPool | None = None,
    prepare: Callable[[], object] | None = None,
) -> StageReport:
    """`run_stage` for a job of one's own; `config` is what the manifest says of its settings.

    `prepare` is called if there is anything to do, before it is done.
    """
    began = time.monotonic()
    folder = job.folder
    _check_tasks(tasks)
    with locked(folder):
        for part in (folder / "done", folder / "dropped"):
            part.mkdir(exist_ok=True)
        _remove_leftovers(folder)
        found = _find_done(job, tasks, redo)
        missing = [task for task in tasks if task.name not in found]
        if missing:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            if prepare is not None:
                prepare()
        done = dict(found)
        for name, one in run_tasks(job, missing, processes=processes, engine=engine, crew=crew):
            done[name] = one
            if on_task is not None:
                on_task(folder.name, len(done), len(tasks))
        _remove_leftovers(folder)  # of processes that died
        manifest = parts.write_manifest(folder, config=config, parent=parent, done=[done[task.name] for task in tasks])
    return StageReport(
        stage=folder.name,
        folder=folder,
        rows=manifest.rows,
        kept=manifest.kept,
        dropped=dict(manifest.dropped),
        done=len(missing),
        found=len(found),
        seconds=time.monotonic() - began,
        hash=manifest.hash,
    )


@contextlib.contextmanager
def executors(config: EngineConfig, on_task: OnTask | None = None) -> Iterator[tuple[Execute, ExecuteJob]]:
    """`run_stage` and `run_job` with an engine, whose processes serve one stage after the other."""
    processes = config.processes
    if processes is None:
        processes = (os.cpu_count() or 1) if config.engine == "local" else 0
    crew = WorkerPool()
    chosen: dict[str, Any] = {"processes": processes, "engine": config.engine, "redo": config.redo}
    chosen |= {"on_task": on_task, "crew": crew}
    try:
        yield partial(run_stage, **chosen), partial(run_job, **chosen)
    finally:
        crew.close()


def _remove_leftovers(folder: Path) -> None:
    for part in (folder, folder / "done", folder / "dropped"):
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
        if done is not None and done.fingerprint != task_fingerprint(job.fingerprint, task):
            stale.add(task.name)
    if stale and not redo:
        raise UsageError(
            f"{job.folder} was begun with other settings or inputs ({len(stale)} of its parts); name another folder, "
            "or add --redo to make it anew"
        )
    for name in stale:
        old = parts.read_done(job.folder, name)
        for path in (f"done/{name}.json", *(old.files if old is not None else ())):
            (job.folder / path).unlink(missing_ok=True)
    current = {name: done for name, done in recorded.items() if done is not None and name not in stale}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = list(pool.map(lambda done: parts.is_whole(job.folder, done), current.values()))
    return {name: done for (name, done), good in zip(current.items(), whole, strict=True) if good}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, so that two runs do not write into it at once; ends with the process."""
    files.make_folder(folder)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunLockedError(f"another process is working in {folder}; wait for it or stop it") from None
        yield
