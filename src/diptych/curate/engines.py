"""Where tasks run: in this process, in processes of this machine, or on a cluster by Ray.

A process that dies in the middle of a task (killed, out of memory, a fault in a C library) costs a second try of that
task in a new process; when that one dies too, the error names the task. A task that raises is not tried again: it would
raise again.
"""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from diptych.curate.config_curate import Engine
from diptych.curate.job import Job, Task
from diptych.curate.parts import Done
from diptych.errors import TaskLostError, UsageError

TRIES = 2
"""How often a task is begun whose process dies."""


def run_tasks(job: Job, tasks: Sequence[Task], *, processes: int, engine: Engine) -> Iterator[tuple[str, Done]]:
    """Do tasks in any order; yields each as it is done."""
    if engine == "ray":
        return _run_on_ray(job, tasks, processes)
    if engine != "local":
        raise UsageError(f"engine is {engine!r}; allowed: local, ray")
    if processes < 0:
        raise UsageError(f"processes is {processes}; allowed: 0 (work in this process) or more")
    return _run_here(job, tasks) if processes == 0 else _run_in_processes(job, tasks, processes)


def _run_here(job: Job, tasks: Sequence[Task]) -> Iterator[tuple[str, Done]]:
    for task in tasks:
        with _naming(job, task):
            yield task.name, job(task)


@contextlib.contextmanager
def _naming(job: Job, task: Task) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in {task.name} of {job.folder.name}, which reads {', '.join(map(str, task.inputs))}")
        raise


@dataclass
class _Worker:
    """A process and the task that it is at."""

    process: BaseProcess
    pipe: Connection
    task: Task | None = None


@dataclass
class _Crew:
    """Processes that are given one task after the other."""

    job: Job
    waiting: deque[Task]
    workers: list[_Worker] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)

    def hire(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(self.job, theirs), daemon=True, name="diptych-curate")
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        self.hand_out(worker)

    def hand_out(self, worker: _Worker) -> None:
        worker.task = self.waiting.popleft() if self.waiting else None
        if worker.task is not None:
            self.tries[worker.task.name] = self.tries.get(worker.task.name, 0) + 1
        with contextlib.suppress(BrokenPipeError):  # it died; its sentinel will say so
            worker.pipe.send(worker.task)

    def bury(self, worker: _Worker) -> None:
        """A process has died: its task goes to the front of the queue, unless it was tried often enough."""
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        if worker.task is None:
            return
        if self.tries[worker.task.name] >= TRIES:
            raise _lost(self.job, worker.task, f"exit code {worker.process.exitcode}")
        self.waiting.appendleft(worker.task)

    def dismiss(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _run_in_processes(job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, Done]]:
    crew = _Crew(job, deque(tasks))
    try:
        for _ in range(min(processes, len(tasks))):
            crew.hire()
        while busy := [worker for worker in crew.workers if worker.task is not None]:
            ready = wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if worker.pipe in ready:
                    yield from _take(crew, worker)
                elif worker.process.sentinel in ready:
                    crew.bury(worker)
                    crew.hire()
    finally:
        crew.dismiss()


def _take(crew: _Crew, worker: _Worker) -> Iterator[tuple[str, Done]]:
    """What a worker sent: the record of its task, an exception, or nothing because it died."""
    try:
        answer = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        crew.bury(worker)
        crew.hire()
        return
    assert worker.task is not None
    if isinstance(answer, BaseException):
        raise answer
    name = worker.task.name
    crew.hand_out(worker)
    yield name, answer


def _work(job: Job, pipe: Connection) -> None:
    """The life of a worker; it ends with its parent, also when that is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while (task := pipe.recv()) is not None:
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


def _run_on_ray(job: Job, tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, Done]]:
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
                running[work.remote(shared, task)] = task
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


def _do(job: Job, task: Task) -> Done:
    with _naming(job, task):
        return job(task)
