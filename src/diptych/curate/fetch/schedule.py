"""Which address is asked next: as many at once as allowed, few of each host, none before its time."""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Download:
    """An address that is to be asked."""

    url: str
    host: str
    tries: int = 0
    """How often it was asked in this run."""
    reason: str = "host_down"
    """Why the last try failed."""


@dataclass
class _Host:
    waiting: deque[Download] = field(default_factory=deque)
    running: int = 0
    free_at: float = 0.0
    pace: float = 0.0
    queued: bool = False
    failures: int = 0


def host_of(url: str) -> str:
    """What limits are counted for: host and port, as written."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


class Schedule:
    """Jobs by host. It reads no clock: every call is told the time, in seconds of any clock that only goes forward."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host] = {}
        self._ready: list[tuple[float, int, str]] = []
        self._later: list[tuple[float, int, Download]] = []
        self._numbers = itertools.count()
        self._held = 0
        self._now = 0.0

    def __len__(self) -> int:
        """Jobs that are not running."""
        return self._held

    def add(self, job: Download, at: float = 0.0) -> None:
        """Put a job in line, not to be started before `at`."""
        self._held += 1
        heapq.heappush(self._later, (at, next(self._numbers), job))

    def take(self, now: float) -> Download | float | None:
        """The next job; or when to ask again; or None if nothing can start before a running job is finished."""
        self._now = now
        while self._later and self._later[0][0] <= now:
            job = heapq.heappop(self._later)[2]
            self._hosts.setdefault(job.host, _Host()).waiting.append(job)
            self._queue(job.host)
        while self._ready and self._ready[0][0] <= now:
            name = heapq.heappop(self._ready)[2]
            host = self._hosts[name]
            host.queued = False
            if host.free_at > now:
                self._queue(name)
                continue
            job = host.waiting.popleft()
            host.running += 1
            if host.pace:
                host.free_at = now + host.pace
            self._held -= 1
            self._queue(name)
            return job
        times = [line[0][0] for line in (self._ready, self._later) if line]
        return min(times, default=None)

    def finish(self, job: Download) -> None:
        """A job has ended; its host may have another."""
        host = self._hosts[job.host]
        host.running -= 1
        self._queue(job.host)
        if not host.running and not host.waiting and not host.failures and not host.pace and host.free_at <= self._now:
            del self._hosts[job.host]

    def pause(self, host: str, until: float) -> None:
        """Ask nothing of a host until then."""
        self._hosts[host].free_at = max(self._hosts[host].free_at, until)

    def slow(self, host: str, pace: float) -> None:
        """Leave this many seconds between the beginnings of two jobs of a host."""
        if self._hosts[host].pace != pace:
            self._hosts[host].pace = pace
            self.pause(host, self._now + pace)

    def note(self, host: str, *, reached: bool) -> int:
        """Count failures to reach a host; returns how many there were in a row."""
        self._hosts[host].failures = 0 if reached else self._hosts[host].failures + 1
        return self._hosts[host].failures

    def failures(self, host: str) -> int:
        """Failures to reach a host, in a row."""
        return self._hosts[host].failures

    def _queue(self, name: str) -> None:
        host = self._hosts[name]
        if host.waiting and host.running < self._per_host and not host.queued:
            host.queued = True
            heapq.heappush(self._ready, (host.free_at, next(self._numbers), name))
