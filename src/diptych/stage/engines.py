"""Where tasks run: in this process, in processes of this machine, or on a cluster by Ray.

A process that dies in the middle of a task (killed, out of memory, a fault in a C library) costs a second try of that
task in a new process; when that one dies too, the error names the task. A task that raises is not tried again: it would
raise again.
"""

import contextlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from diptych.errors import TaskLostError, UsageError
from diptych.stage.config import Engine
from diptych.stage.folder import TaskRecord
from diptych.stage.job import Job, Task

TRIES = 2
"""How often a task is begun whose process dies."""


def run_tasks(
    job: Job, tasks: Sequence[Task], *, processes: int, engine: Engine, crew: "WorkerPool | None" = None
) -> Iterator[tuple[str, TaskRecord]]:
    """Do tasks in any order; yields each as it is done. A crew is one whose processes live on behind this job."""
    if engine == "ray":
        return _run_on_ray(job, tasks, processes)
    if engine != "local":
        raise UsageError(f"engine is {engine!r}; allowed: local, ray")
    if processes < 0:
        raise UsageError(f"processes is {processes}; allowed: 0 (work in this process) or more")
    if processes == 0:
        return _run_here(job, tasks)
    return crew.run(job, tasks, processes) if crew is not None else _run_alone(job, tasks, processes)


def _run_here(job: Job, tasks: Sequence[Task]) -> Iterator[tuple[str, TaskRecord]]:
    for task in tasks:
        with _naming(job, task):
            yield task.name, job(task)


def _run_alone(job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, TaskRecord]]:
    crew = WorkerPool()
    try:
        yield from crew.run(job, tasks, processes)
    finally:
        crew.close()


@contextlib.contextmanager
def _naming(job: Job, task: Task) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in {task.name} of {job.folder.name}, which reads {', '.join(map(str, task.inputs))}")
        raise


@dataclass
class _Worker:
    """A process, the job that it knows and the task that it is at."""

    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    task: Task | None = None


class WorkerPool:
    """Processes that are given one task after the other, of one job after the other."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._tries: Counter[str] = Counter()

    def run(self, job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, TaskRecord]]:
        """Do tasks with so many processes; yields each as it is done."""
        self._waiting, self._tries = deque(tasks), Counter()
        wanted = min(processes, len(tasks))
        try:
            while len(self._workers) < wanted:
                self._start()
            for worker in self._workers[:wanted]:
                self._assign(job, worker)
            while busy := [worker for worker in self._workers if worker.task is not None]:
                ready = wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy])
                for worker in busy:
                    if worker.pipe in ready or worker.process.sentinel in ready:
                        yield from self._take(job, worker)
        finally:
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._stop(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self._stop(worker)

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True, name="diptych-curate")
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _assign(self, job: Job, worker: _Worker) -> None:
        worker.task = self._waiting.popleft() if self._waiting else None
        if worker.task is None:
            return
        self._tries[worker.task.name] += 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; its sentinel will say so
            worker.pipe.send((job if worker.job is not job else None, worker.task))
        worker.job = job

    def _take(self, job: Job, worker: _Worker) -> Iterator[tuple[str, TaskRecord]]:
        """What a worker sent: the record of its task, an exception, or nothing because it died."""
        assert worker.task is not None
        try:
            answer = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._replace(job, worker)
            return
        name, worker.task = worker.task.name, None
        if isinstance(answer, BaseException):
            raise answer
        self._assign(job, worker)
        yield name, answer

    def _replace(self, job: Job, worker: _Worker) -> None:
        """A process has died: another one begins its task again, unless it was tried often enough."""
        task, worker.task = worker.task, None
        self._stop(worker)
        assert task is not None
        if self._tries[task.name] >= TRIES:
            raise _lost(job, task, f"exit code {worker.process.exitcode}")
        self._waiting.appendleft(task)
        self._assign(job, self._start())

    def _stop(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, also when that is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(pipe: Connection) -> None:
    """The life of a worker; it ends with its parent, also when that is killed."""
    end_with_parent()
    job: Job | None = None
    while True:
        given, task = pipe.recv()
        job = given if given is not None else job
        assert job is not None
        try:
            with _naming(job, task):
                answer: object = job(task)
        except Exception as error:
            answer = error
        pipe.send(answer)


def _lost(job: Job, task: Task, how: str) -> TaskLostError:
    return TaskLostError(
        f"{task.name} of {job.folder.name} ended its process {TRIES} times ({how}); it reads "
        f"{', '.join(map(str, task.inputs))}. Out of memory? Use fewer processes; else leave that input out"
    )


def _run_on_ray(job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, TaskRecord]]:
    """Ray schedules and retries; the folder must be at the same path on all machines of the cluster."""
    try:
        import ray
        from ray import exceptions
    except ImportError:
        raise UsageError("engine ray needs Ray; `pip install diptych[ray]`") from None
    if not ray.is_initialized():
        own = None if os.environ.get("RAY_ADDRESS") else processes or None
        ray.init(num_cpus=own, log_to_driver=False, include_dashboard=False)
    shared = ray.put(job)
    work: Any = ray.remote(num_cpus=1, max_retries=TRIES - 1, retry_exceptions=False)(_do)
    waiting = deque(tasks)
    width = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Task] = {}
    try:
        while waiting or running:
            while waiting and len(running) < width:
                task = waiting.popleft()
                running[work.remote(shared, task, os.getcwd())] = task
            ready, _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready[0])
            try:
                yield task.name, ray.get(ready[0])
            except exceptions.RayTaskError as error:
                raise error.cause from None
            except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
                raise _lost(job, task, type(error).__name__) from None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _do(job: Job, task: Task, folder: str) -> TaskRecord:
    with contextlib.suppress(FileNotFoundError):  # relative paths mean the same as where the run was started
        os.chdir(folder)
    with _naming(job, task):
        return job(task)
