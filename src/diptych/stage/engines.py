"""Workers: processes of this machine, or actors of a Ray cluster, that are given tasks.

A worker that dies in the middle of its tasks (killed, out of memory, a fault in a C library) costs a second try of them
by a new one; when that one dies too, the error names them. A task that raises is not tried again: it would raise again.
"""

import contextlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, runtime_checkable

from diptych.errors import TaskLostError, UsageError, install
from diptych.stage.folder import TaskRecord
from diptych.stage.job import Job, Task

TRIES = 2
"""How often tasks are begun whose worker dies."""


@dataclass(frozen=True)
class Died:
    """The answer of a worker that is no more."""

    how: str


Answer = list[TaskRecord] | Exception | Died


@runtime_checkable
class Worker(Protocol):
    """Does tasks elsewhere, one batch of them at a time."""

    reusable: bool
    """Whether it is kept, once nothing is left to do, for the next job."""

    def give(self, job: Job, tasks: Sequence[Task], /) -> None:
        """Let it begin."""
        ...

    def take(self) -> Answer:
        """What came of it, once `wait` has named this worker."""
        ...

    def stop(self) -> None:
        """End it, whatever it is at."""
        ...

    @classmethod
    def wait(cls, workers: Sequence[Any]) -> list[Any]:
        """Wait for at least one of some busy workers; which have an answer."""
        ...


class WorkerPool:
    """Workers that are given one batch of tasks after the other, of one job after the other."""

    def __init__(self, start: Callable[[], Worker]) -> None:
        self._start = start
        self._idle: list[Worker] = []

    def run(self, job: Job, batches: Iterable[Sequence[Task]], width: int) -> Iterator[tuple[str, TaskRecord]]:
        """Do batches of tasks, `width` at once; yields each task's name and record, in any order."""
        waiting, tries, busy = deque(batches), Counter[str](), dict[Worker, Sequence[Task]]()
        try:
            while waiting or busy:
                while waiting and len(busy) < width:
                    worker, tasks = self._idle.pop() if self._idle else self._start(), waiting.popleft()
                    tries[tasks[0].name] += 1
                    busy[worker] = tasks
                    worker.give(job, tasks)
                for worker in next(iter(busy)).wait(list(busy)):
                    answer, tasks = worker.take(), busy.pop(worker)
                    if isinstance(answer, Died):
                        worker.stop()
                        if tries[tasks[0].name] >= TRIES:
                            raise _lost(job, tasks, answer.how)
                        waiting.appendleft(tasks)
                        continue
                    if waiting or worker.reusable:
                        self._idle.append(worker)
                    else:  # what it holds may be all that another one waits for
                        worker.stop()
                    if isinstance(answer, Exception):
                        raise answer
                    yield from zip((task.name for task in tasks), answer, strict=True)
        finally:
            for worker in busy:
                worker.stop()

    def close(self) -> None:
        """End all workers."""
        while self._idle:
            self._idle.pop().stop()


def _lost(job: Job, tasks: Sequence[Task], how: str) -> TaskLostError:
    names = tasks[0].name + (f" to {tasks[-1].name}" if len(tasks) > 1 else "")
    inputs = ", ".join(dict.fromkeys(str(one) for task in tasks for one in task.inputs))
    return TaskLostError(
        f"{names} of {job.stage} ended its process {TRIES} times ({how}); it reads {inputs}. Out of memory? "
        f"{job.LIGHTER}. What is done stays done: start the same command again"
    )


class LocalWorker:
    """A process of this machine."""

    reusable = True

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True, name="diptych-stage")
        self._process.start()
        theirs.close()
        self._job: Job | None = None

    def give(self, job: Job, tasks: Sequence[Task], /) -> None:
        """Send the tasks, and the job if it is another one."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; its sentinel will say so
            self._pipe.send((job if self._job is not job else None, tasks))
        self._job = job

    def take(self) -> Answer:
        """What it sent, or how it ended."""
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Died(f"exit code {self._process.exitcode}")

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    @classmethod
    def wait(cls, workers: Sequence["LocalWorker"]) -> list["LocalWorker"]:
        """Those that sent something or ended."""
        ready = wait([one for worker in workers for one in (worker._pipe, worker._process.sentinel)])
        return [worker for worker in workers if worker._pipe in ready or worker._process.sentinel in ready]


def end_with_parent() -> None:
    """Let this process end when the one that started it does, also when that is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(pipe: Connection) -> None:
    """The life of a process that does tasks."""
    end_with_parent()
    job: Job | None = None
    while True:
        given, tasks = pipe.recv()
        job = given if given is not None else job
        assert job is not None
        try:
            answer: Answer = list(job(tasks))
        except Exception as error:
            answer = error
        pipe.send(answer)


def connect_ray(processes: int = 0) -> Any:
    """The module `ray`, connected to the cluster of $RAY_ADDRESS or to one started here, of so many cores."""
    try:
        import ray
    except ImportError:
        raise UsageError(f"engine ray needs Ray: {install('ray')}") from None
    if not ray.is_initialized():
        own = None if os.environ.get("RAY_ADDRESS") else processes or None
        ray.init(num_cpus=own, log_to_driver=False, include_dashboard=False)
    return ray


class RayWorker:
    """An actor of a Ray cluster; what the job reads and writes must be at the same paths on all machines."""

    reusable = False

    def __init__(self, ray: Any, job: Any, resources: Mapping[str, Any]) -> None:
        self.ray, self._actor = ray, ray.remote(**resources)(Actor).remote(job, os.getcwd())
        self._answer: Any = None

    def give(self, _: Job, tasks: Sequence[Task], /) -> None:
        """Call the actor, which has the job."""
        self._answer = self._actor.do.remote(tasks)

    def take(self) -> Answer:
        """What it gave back, or how it ended."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(self._answer)
        except exceptions.RayTaskError as error:
            return error.cause
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            return Died(type(error).__name__)

    def stop(self) -> None:
        """Kill the actor."""
        self.ray.kill(self._actor)

    @classmethod
    def wait(cls, workers: Sequence["RayWorker"]) -> list["RayWorker"]:
        """Those whose call has ended."""
        ready, _ = workers[0].ray.wait([worker._answer for worker in workers], num_returns=1)
        return [worker for worker in workers if worker._answer in ready]


class Actor:
    """A job on one machine of a cluster."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job = job
        with contextlib.suppress(FileNotFoundError):  # relative paths mean the same as where the run was started
            os.chdir(folder)

    def do(self, tasks: Sequence[Task]) -> list[TaskRecord]:
        """Do some tasks."""
        return list(self.job(tasks))
