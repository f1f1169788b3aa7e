"""Pairs with the addresses of pictures -> pairs with pictures. See `address`, `visit`, `schedule` and `ledger`.

    work/fetch/
      ledger/0000/...              what became of each address, and the bytes as they came: the memory
      outcomes/part-00000.json     a hash of what the ledger says of a part's addresses
      part-00000.parquet ...       as every stage

Two steps. The first asks the web and is no pure function of anything: it fills the ledger, every address once however
many pairs have it. The second is a stage like the others: a row becomes what the ledger and the stored bytes say of
its address, in the order of the input. So the files and the manifest's hash depend on what the web answered and not on
when, in which order, in how many processes or after how many kills.

A later run asks only what failed (`retry`) and makes only those parts anew whose outcomes changed.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.curate.fetch.client import Picture, Visitor
from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.guard import Guard, parse_allowed
from diptych.curate.fetch.ledger import Ledger, Reader, partition_of
from diptych.curate.fetch.outcomes import OK, NotFetched, is_transient
from diptych.curate.fetch.schedule import Download, Schedule, host_of
from diptych.curate.images.blocklist import Known, KnownHashes, read_known
from diptych.curate.images.prepare import looks_like_picture, prepare
from diptych.curate.rows import with_reason
from diptych.errors import DownloadError, PictureError, ShardError, UsageError
from diptych.stage.folder import MANIFEST_FILE, read_manifest, read_part
from diptych.stage.job import Task
from diptych.stage.run import Engine, StageReport, tasks_of

_UNREACHED = frozenset({"dns", "connect", "tls", "timeout", "robots_unreachable"})
_PAUSING = ("http_429", "http_503")
_WINDOW = 4096
_DNS_LAST = 500
_DNS_SHARE = 0.6
_ROWS = 64
"""Rows of a batch that is given on with pictures: bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """What a fetch did."""

    outcomes: dict[str, int]
    """`ok` or a reason -> addresses, over all runs."""
    asked: int
    """Addresses that this run tried."""
    stage: StageReport


def run(
    config: FetchConfig, *, engine: Engine, on_progress: Callable[[Counter[str]], None] | None = None
) -> FetchReport:
    """Fetch what is missing and write the pairs; `on_progress` is told outcomes -> addresses now and then."""
    tasks = tasks_of(config.folder)
    known = read_known(config.known_hashes, config.known_distance, config.max_pixels)
    ledger = config.out / "ledger"
    _begin(config, ledger)
    _plan(config, tasks, ledger)
    asked = _ask_all(config, known, on_progress)
    _reopen_changed(config, tasks, ledger)
    stage = Build(
        ledger=ledger,
        partitions=config.partitions,
        known=known,
        size=config.size,
        quality=config.quality,
        keep_original=config.keep_original,
        min_side=config.min_side,
        max_aspect=config.max_aspect,
        max_pixels=config.max_pixels,
    )
    report = engine.run_stage(
        stage,
        tasks,
        config.out,
        _deciding(config) | {name: vars(stage)[name] for name in _BUILT} | {"known_hashes": config.known_hashes},
        schema=_schema(tasks),
        parent=read_manifest(config.folder).hash if (config.folder / MANIFEST_FILE).exists() else None,
    )
    return FetchReport(outcomes=dict(sorted(count_outcomes(config).items())), asked=asked, stage=report)


def count_outcomes(config: FetchConfig) -> Counter[str]:
    """Outcome -> addresses, over all partitions; not tried ones count as ``."""
    total: Counter[str] = Counter()
    for place in range(config.partitions):
        with Ledger(config.out / "ledger" / f"{place:04d}") as ledger:
            total += ledger.counts()
    return total


def forget(out: Path, urls: Iterable[str]) -> int:
    """Remove pictures from a fetch's folder for good; returns how many addresses were known.

    Their rows leave the parts, with the reason `deleted`, when the fetch is run again.
    """
    partitions = json.loads((out / "ledger" / "settings.json").read_text())["partitions"]
    known = 0
    for url in urls:
        with Ledger(out / "ledger" / f"{partition_of(url, partitions):04d}") as ledger:
            known += ledger.forget(url)
    return known


_BUILT = ("size", "quality", "keep_original", "min_side", "max_aspect", "max_pixels")
_DECIDING = ("product", "max_bytes", "max_redirects", "ports", "robots", "opt_outs")


def _deciding(config: FetchConfig) -> dict[str, Any]:
    """What decides whether an address may be asked and its answer kept; the rest only decides when."""
    values = {name: vars(config)[name] for name in _DECIDING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _begin(config: FetchConfig, ledger: Path) -> None:
    """Hold the settings against those that the ledger was begun with."""
    ledger.mkdir(parents=True, exist_ok=True)
    path, settings = ledger / "settings.json", _deciding(config) | {"partitions": config.partitions}
    if not path.exists():
        files.write_json(path, settings)
        return
    begun = json.loads(path.read_text())
    for name, value in settings.items():
        if begun.get(name) != value:
            raise UsageError(
                f"{config.out} was begun with {name} {begun.get(name)}, not {value}; its ledger would mix both: use "
                "the old value or another folder"
            )


def _plan(config: FetchConfig, tasks: Sequence[Task], ledger: Path) -> None:
    """Write every address into the ledger of its host's partition; each part once."""
    planned = ledger / "planned"
    planned.mkdir(exist_ok=True)
    for task in tasks:
        mark = planned / f"{task.name}.json"
        described = task.describe()
        if mark.exists() and json.loads(mark.read_text()) == described:
            continue
        urls: dict[int, set[str]] = {}
        for path in task.inputs:
            for batch in read_part(Path(path), ["image_url"]):
                for url in filter(None, batch.column(0).to_pylist()):
                    urls.setdefault(partition_of(url, config.partitions), set()).add(url)
        for place, chosen in urls.items():
            with Ledger(ledger / f"{place:04d}") as one:
                one.add(sorted(chosen))
        files.write_json(mark, described)
    for place in range(config.partitions):
        (ledger / f"{place:04d}").mkdir(exist_ok=True)


def _ask_all(config: FetchConfig, known: KnownHashes, on_progress: Callable[[Counter[str]], None] | None) -> int:
    if config.partitions == 1:
        return fetch_partition(config, 0, known, on_progress=on_progress)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.partitions, context, initializer=_die_with_parent) as pool:
        running = [pool.submit(fetch_partition, config, place, known) for place in range(config.partitions)]
        return sum(future.result() for future in running)


def _die_with_parent() -> None:
    """A killed run leaves no process behind that goes on asking."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
                    self._fill(feed)
                    wait = self._start(running)
                    if not running and not len(self._schedule):
                        return self._counts.total()
                    await self._some(running, wait)
                    if self._on_progress is not None and time.monotonic() - told > 1:
                        told = time.monotonic()
                        self._on_progress(self._counts.copy())
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _fill(self, feed: Iterator[str]) -> None:
        while len(self._schedule) < _WINDOW and (url := next(feed, None)) is not None:
            self._schedule.add(Download(url, host_of(url)))

    def _start(self, running: set[asyncio.Task[None]]) -> float | None:
        """Start what may start; returns seconds until something else may."""
        while len(running) < self._config.concurrency:
            now = time.monotonic()
            job = self._schedule.take(now)
            if not isinstance(job, Download):
                return None if job is None else max(0.0, job - now)
            running.add(asyncio.create_task(self._one(job)))
        return None

    async def _some(self, running: set[asyncio.Task[None]], wait: float | None) -> None:
        if not running:
            await asyncio.sleep(wait or 0)
            return
        done, _ = await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            running.discard(task)
            task.result()  # what is not a NotFetched is a bug or a full disk: stop

    async def _one(self, job: Download) -> None:
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

    async def _check(self, picture: Picture) -> None:
        """Before anything is written."""
        if not looks_like_picture(picture.data):
            raise NotFetched("not_a_picture", repr(picture.data[:16]))
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


def _schema(tasks: Sequence[Task]) -> pa.Schema:
    """The columns of the pairs that are read; pictures are added to them."""
    return pq.read_schema(tasks[0].inputs[0]).remove_metadata()


def _reopen_changed(config: FetchConfig, tasks: Sequence[Task], ledger: Path) -> None:
    """Take back the commit of each part of which the ledger says something else than when it was made."""
    folder = config.out / "outcomes"
    folder.mkdir(exist_ok=True)
    with Reader(ledger, config.partitions) as reader:
        for task in tasks:
            digest = _outcomes_hash(task, reader)
            path = folder / f"{task.name}.json"
            if path.exists() and json.loads(path.read_text()) == digest:
                continue
            (config.out / "done" / f"{task.name}.json").unlink(missing_ok=True)
            files.write_json(path, digest)


def _outcomes_hash(task: Task, reader: Reader) -> str:
    digest = hashlib.sha256()
    for path in task.inputs:
        for batch in read_part(Path(path), ["image_url"]):
            for url in batch.column(0).to_pylist():
                entry = reader.find(url) if url else None
                told = [entry.outcome, entry.sha256, entry.final_url] if entry else None
                digest.update(json.dumps(told).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Build:
    """The stage: rows with addresses -> rows with the pictures that the ledger holds."""

    ledger: Path
    partitions: int
    known: KnownHashes
    size: int
    quality: int
    keep_original: bool
    min_side: int
    max_aspect: float
    max_pixels: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with Reader(self.ledger, self.partitions) as reader:
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield self._fill(batch.slice(start, _ROWS), reader)

    def _fill(self, batch: pa.RecordBatch, reader: Reader) -> pa.RecordBatch:
        images, details, reasons = [], [], []
        for url, known in zip(batch.column("image_url").to_pylist(), batch.column("details").to_pylist(), strict=True):
            found = self._picture(url, reader)
            if isinstance(found, str):
                images.append(None)
                details.append(known)
                reasons.append(found)
                continue
            image, facts = found
            images.append(image)
            details.append(list((dict(known) | facts).items()))
            reasons.append(None)
        for name, values in (("image", images), ("details", details)):
            place = batch.schema.get_field_index(name)
            column = batch.schema.field(place)
            batch = batch.set_column(place, column, pa.array(values, column.type))
        return with_reason(batch, reasons)

    def _picture(self, url: str | None, reader: Reader) -> tuple[bytes, dict[str, str]] | str:
        """A picture and what is noted of it, or the reason why there is none."""
        entry = reader.find(url) if url else None
        if url is None or entry is None:
            return "url" if not url else "not_tried"
        if entry.outcome != OK:
            return entry.outcome
        data = reader.read(url, entry)
        if data is None:
            raise ShardError(f"the stored bytes of {url} in {self.ledger} are damaged; delete that ledger, run again")
        if self.known and self.known(data) is not None:
            return "known_hash"
        try:
            made = prepare(
                data,
                size=self.size,
                quality=self.quality,
                keep_original=self.keep_original,
                min_side=self.min_side,
                max_aspect=self.max_aspect,
                max_pixels=self.max_pixels,
            )
        except PictureError as error:
            return error.reason
        facts = {
            "sha256": entry.sha256 or "",
            "width": str(made.width),
            "height": str(made.height),
            "original_width": str(made.original_width),
            "original_height": str(made.original_height),
        }
        return made.data, facts | ({"final_url": entry.final_url} if entry.final_url else {})
