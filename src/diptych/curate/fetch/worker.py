"""The event loop that asks for all open addresses of one partition, and notes in its ledger what became of each."""

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable

from diptych.curate.fetch.client import FetchedImage, Visitor
from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.guard import Guard, parse_allowed
from diptych.curate.fetch.ledger import Ledger
from diptych.curate.fetch.outcomes import OK, NotFetched, is_transient
from diptych.curate.fetch.schedule import Download, Schedule, host_of
from diptych.curate.images.blocklist import Known
from diptych.curate.images.prepare import FORMATS
from diptych.errors import DownloadError
from diptych.image_file import find_format

_UNREACHED = frozenset({"dns", "connect", "tls", "timeout", "robots_unreachable"})
_PAUSING = ("http_429", "http_503")
_WINDOW = 4096
_DNS_LAST = 500
_DNS_SHARE = 0.6


def fetch_partition(
    config: FetchConfig,
    place: int,
    known: Known | None = None,
    *,
    guard: Guard | None = None,
    on_progress: Callable[[Counter[str]], None] | None = None,
) -> int:
    """Ask all open addresses of one partition; returns how many."""
    guard = guard or Guard(allowed=parse_allowed(config.allow_host))
    with Ledger(config.out / "ledger" / f"{place:04d}") as ledger:
        return asyncio.run(_Fetcher(config, ledger, guard, known or None, on_progress).run())


class _Fetcher:
    """One partition's event loop."""

    def __init__(
        self,
        config: FetchConfig,
        ledger: Ledger,
        guard: Guard,
        known: Known | None,
        on_progress: Callable[[Counter[str]], None] | None,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._known = known
        self._visitor = Visitor(config, guard, ledger)
        self._schedule = Schedule(config.per_host)
        self._on_progress = on_progress
        self._counts: Counter[str] = Counter()
        self._last: deque[bool] = deque(maxlen=_DNS_LAST)

    async def run(self) -> int:
        feed = self._ledger.iter_open(self._config.retry)
        running: set[asyncio.Task[None]] = set()
        told = time.monotonic()
        async with self._visitor:
            try:
                while True:
                    while len(self._schedule) < _WINDOW and (url := next(feed, None)) is not None:
                        self._schedule.add(Download(url, host_of(url)))
                    wait = self._start_jobs(running)
                    if not running and not len(self._schedule):
                        return self._counts.total()
                    await self._wait(running, wait)
                    if self._on_progress is not None and time.monotonic() - told > 1:
                        told = time.monotonic()
                        self._on_progress(self._counts.copy())
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _start_jobs(self, running: set[asyncio.Task[None]]) -> float | None:
        """Start what may start; returns seconds until something else may."""
        while len(running) < self._config.concurrency:
            now = time.monotonic()
            job = self._schedule.take(now)
            if not isinstance(job, Download):
                return None if job is None else max(0.0, job - now)
            running.add(asyncio.create_task(self._download(job)))
        return None

    async def _wait(self, running: set[asyncio.Task[None]], wait: float | None) -> None:
        if not running:
            await asyncio.sleep(wait or 0)
            return
        done, _ = await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            running.discard(task)
            task.result()  # what is not a NotFetched is a bug or a full disk: stop

    async def _download(self, job: Download) -> None:
        if self._schedule.failures(job.host) >= self._config.dead_after:
            self._give_up(job, NotFetched(job.reason, "the host could not be reached several times in a row"))
            self._schedule.finish(job)
            return
        job.tries += 1
        try:
            picture = await self._visitor.fetch(job.url)
            await self._check(picture)
        except NotFetched as error:
            self._failed(job, error)
        else:
            self._schedule.note(job.host, reached=True)
            final = picture.url if picture.url != job.url else None
            digest = hashlib.sha256(picture.data).hexdigest()
            self._ledger.store(job.url, picture.data, sha256=digest, final_url=final, tries=job.tries)
            self._count(OK)
        finally:
            delay = self._visitor.crawl_delay(job.url)
            if delay:
                self._schedule.slow(job.host, delay)
            self._schedule.finish(job)

    async def _check(self, picture: FetchedImage) -> None:
        """Before anything is written."""
        found = find_format(picture.data)
        if found not in FORMATS:
            raise NotFetched("not_a_picture" if found is None else "format", found or repr(picture.data[:16]))
        listed = await asyncio.to_thread(self._known, picture.data) if self._known is not None else None
        if listed is not None:
            raise NotFetched("known_hash", listed)

    def _failed(self, job: Download, error: NotFetched) -> None:
        now, reason, wait = time.monotonic(), error.reason, error.wait
        self._schedule.note(job.host, reached=reason not in _UNREACHED)
        job.reason = reason
        backoff = self._config.backoff * 2 ** (job.tries - 1)
        pause = max(wait or 0.0, backoff)
        if reason in _PAUSING:
            self._schedule.pause(job.host, now + min(pause, self._config.max_wait))
        if is_transient(reason) and job.tries < self._config.attempts and pause <= self._config.max_wait:
            self._schedule.add(job, now + pause)
            return
        self._give_up(job, error)

    def _give_up(self, job: Download, error: NotFetched) -> None:
        again_at = time.time() + error.wait if error.wait is not None and is_transient(error.reason) else None
        self._ledger.fail(job.url, error.reason, detail=error.detail, tries=job.tries, again_at=again_at)
        self._count(error.reason)

    def _count(self, outcome: str) -> None:
        self._counts[outcome] += 1
        self._last.append(outcome == "dns")
        if len(self._last) == _DNS_LAST and sum(self._last) > _DNS_SHARE * _DNS_LAST:
            raise DownloadError(
                f"{sum(self._last)} of the last {_DNS_LAST} addresses had a name that was not found: the resolver is "
                "overloaded or away; use a local caching resolver or fewer --concurrency, then run again: nothing "
                "that was fetched is lost"
            )
