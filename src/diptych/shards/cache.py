"""Shards that lie elsewhere, on this machine for as long as they are read: a bounded folder that processes share.

A shard is downloaded whole, beside its name, held to its size and to the hash of every picture its index lists, and
only then gets its name: what has a name is whole. A half-written file is thrown away. Locks are `flock`s and so end
with their process, however it ends: on NAME.lock while a shard is fetched, so that the processes of a machine fetch it
once; a shared one on the tar itself while someone may read it, so that no one removes it.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import xxhash

from diptych import files
from diptych.config import hide_secrets
from diptych.errors import NotFoundError, ShardError
from diptych.machine import open_file, read_at, remove_unshared, share
from diptych.shards.index import ShardIndex
from diptych.shards.order import SourceOrder

LOG = logging.getLogger(__name__)
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds before each further try."""
OPENING_TRIES = 4
"""So many of them before anything was done: who has just typed an address is told soon that nothing answers there."""
THREADS = 4
"""Shards of a source that are fetched at a time."""
SLOW = 10.0
"""Seconds after which a wait for the network is told."""


@dataclass(frozen=True)
class RemoteShard:
    """One tar at a URL, and where it lies while it is here."""

    files: Any
    """The fsspec file system."""
    place: str
    """In terms of that file system."""
    url: str
    size: int | None
    """Bytes, if the other side says so."""
    local: Path


class ShardCache:
    """The folder, and the bytes that it may take."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, shard: RemoteShard, index: ShardIndex | None, *, urgent: bool = True) -> int | None:
        """A descriptor of the whole shard, which stays as long as it is open. Fetches the shard if it is not here.

        What is not urgent is left alone if there is no room (None). Raises ShardError if all tries failed.
        """
        shard.local.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if (descriptor := _open_here(shard)) is not None:
                return descriptor
            with _locked(shard.local.with_suffix(".lock")):
                if (descriptor := _open_here(shard)) is not None:
                    return descriptor
                if not self._reserve(shard) and not urgent:
                    return None
                try:
                    self._fetch(shard, index)
                finally:
                    _reserve_file(shard).unlink(missing_ok=True)

    def _fetch(self, shard: RemoteShard, index: ShardIndex | None) -> None:
        part = shard.local.with_suffix(".part")

        def fetch() -> None:
            shard.files.get_file(shard.place, str(part))
            check_shard(part, shard, index)
            files.sync_file(part)
            os.replace(part, shard.local)
            files.sync_folder(part.parent)

        try:
            with_retries(shard.url, fetch)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, shard: RemoteShard) -> bool:
        """Make room for a shard, oldest first; whether there is enough now."""
        wanted = shard.size or 0
        with _locked(self.folder / "room.lock"):
            reserved = self._reserved()  # first: a download that ends in between is then seen twice, not never
            here = sorted((status.st_mtime, tar, status.st_size) for tar, status in self._tars())
            used = sum((reserved | {tar: size for _, tar, size in here}).values())
            for _, tar, size in here:
                if used + wanted <= self.limit:
                    break
                if remove_unshared(tar):
                    used -= size
            _reserve_file(shard).write_text(str(wanted), "ascii")
            return used + wanted <= self.limit

    def _tars(self) -> Iterator[tuple[Path, os.stat_result]]:
        for tar in self.folder.glob("*/*.tar"):
            with contextlib.suppress(FileNotFoundError):
                yield tar, tar.stat()

    def _reserved(self) -> dict[Path, int]:
        """Bytes that downloads under way will take; what a killed process had reserved is forgotten."""
        found: dict[Path, int] = {}
        for reserve in self.folder.glob("*/*.reserve"):
            with contextlib.suppress(FileNotFoundError, ValueError), open(reserve.with_suffix(".lock"), "ab") as lock:
                if filelock.lock_descriptor(lock.fileno(), blocking=False):
                    reserve.unlink()
                else:
                    found[reserve.with_suffix(".tar")] = int(reserve.read_text("ascii"))
        return found


def with_retries(url: str, action: Callable[[], Any], *, opening: bool = False) -> Any:
    """Do what needs the network, again and again; in the end a ShardError that names URL and reason."""
    url, delays = hide_secrets(url), DELAYS[:OPENING_TRIES] if opening else DELAYS
    for number, delay in enumerate((*delays, None)):
        try:
            return action()
        except FileNotFoundError:
            raise NotFoundError(f"no such shard or file: {url}") from None
        except Exception as error:  # every file system raises its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ShardError(f"no space left for {url}; name another --cache or a smaller --cache-bytes") from None
            reason = hide_secrets(str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}")
            if delay is None:
                raise ShardError(
                    f"{url} could not be fetched in {len(delays) + 1} tries; the last: {reason}. What is here is kept: "
                    "the same command goes on once the other side answers"
                ) from None
            if not number:
                reason = f"{reason}; trying again for {sum(delays):g} s"
            LOG.warning("fetching %s failed (%s)", url, reason)
            time.sleep(delay)
    raise AssertionError("unreachable")


def check_shard(path: Path, shard: RemoteShard, index: ShardIndex | None) -> None:
    """Hold a download to its size and to the hash of every picture; raises ShardError."""
    size = path.stat().st_size
    if shard.size is not None and size != shard.size:
        raise ShardError(f"{size} bytes came, not {shard.size}")
    if index is None:
        return
    with open(path, "rb") as tar:
        for row in index.table.select(["key", "offset", "size", "xxh3"]).to_pylist():
            data = read_at(tar.fileno(), row["size"], row["offset"])
            if xxhash.xxh3_64_intdigest(data) != row["xxh3"]:
                raise ShardError(f"sample {row['key']} is not the bytes that were indexed")


class Fetcher:
    """Has the shards of one source here before they are read: the block that is read, then the next one."""

    def __init__(
        self, cache: ShardCache, shards: tuple[RemoteShard, ...], indexes: tuple[ShardIndex, ...], order: SourceOrder
    ) -> None:
        self.cache, self.shards, self.indexes, self.order = cache, shards, indexes, order
        self._open: dict[int, int] = {}
        self._readers: Counter[int] = Counter()
        self._now: tuple[int, ...] = ()
        self._next: tuple[int, ...] = ()
        self._position = 0
        self._tried: set[int] = set()
        self._busy: set[int] = set()
        self._ahead: set[int] = set()
        """Those of the busy ones that no batch waits for."""
        self._urgent = 0
        """Batches that wait for a shard."""
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def _begin(self, position: int) -> None:
        """Reading has come to a position of the endless order: fetch its block and the one behind it."""
        with self._changed:
            self._stopping = False
            self._position = max(position, self._position)  # threads begin batches in any order
            now, following = self.order.shards_from(self._position)
            if (now, following) != (self._now, self._next):
                self._now, self._next, self._tried = now, following, set()
                self._close_unneeded({*now, *following})
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    @contextlib.contextmanager
    def reading(self, position: int, shards: set[int]) -> Iterator[None]:
        """A batch from a position on is made of these shards: none of them goes until then."""
        with self._changed:
            self._readers.update(shards)
            self._begin(position)
        try:
            yield
        finally:
            with self._changed:
                self._readers.subtract(shards)
                self._close_unneeded({*self._now, *self._next})

    def descriptor(self, shard: int) -> int:
        """The open shard; waits for the network if it is not here yet."""
        began = time.monotonic()
        with self._changed:
            while shard in self._busy:
                self._changed.wait()
            if shard in self._open:
                return self._open[shard]
            self._busy.add(shard)
            self._urgent += 1
        try:
            if not self._fetch(shard, urgent=False):
                with self._changed:  # what is needed now goes before what was fetched ahead
                    self._changed.wait_for(lambda: not self._ahead)
                    self._close_unneeded(set(self._now))
                self._fetch(shard, urgent=True)
        finally:
            with self._changed:
                self._urgent -= 1
            self._done(shard)
        if (waited := time.monotonic() - began) > SLOW:
            LOG.warning("waited %.0f s for %s", waited, self.shards[shard].url)
        return self._open[shard]

    def close(self) -> None:
        """Stop fetching ahead, let go of every shard."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._threads = []
            self._now = self._next = ()
            self._position = 0
            self._close_unneeded(set())

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                while (shard := self._choose()) is None or self._stopping:
                    if self._stopping or me not in self._threads:
                        return
                    self._changed.wait()
                self._busy.add(shard)
                self._ahead.add(shard)
                self._tried.add(shard)
            try:
                self._fetch(shard, urgent=False)
            except Exception as error:  # who needs the shard tries again, and is told if that fails too
                LOG.warning("could not fetch ahead: %s", error)
            finally:
                with self._changed:
                    self._ahead.discard(shard)
                self._done(shard)

    def _choose(self) -> int | None:
        if self._urgent:
            return None
        for shard in (*self._now, *self._next):
            if shard not in self._open and shard not in self._busy and shard not in self._tried:
                return shard
        return None

    def _fetch(self, shard: int, *, urgent: bool) -> bool:
        descriptor = self.cache.open(self.shards[shard], self.indexes[shard], urgent=urgent)
        if descriptor is not None:
            with self._changed:
                self._open[shard] = descriptor
        return descriptor is not None

    def _done(self, shard: int) -> None:
        with self._changed:
            self._busy.discard(shard)
            if self._stopping:
                self._close_unneeded(set())
            self._changed.notify_all()

    def _close_unneeded(self, needed: set[int]) -> None:
        for shard in [s for s in self._open if s not in needed and self._readers[s] <= 0]:
            os.close(self._open.pop(shard))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as lock:
        filelock.lock_descriptor(lock.fileno())
        yield


def _open_here(shard: RemoteShard) -> int | None:
    """Open a shard that is here and hold it; one of another size is not what was fetched, and removed."""
    try:
        descriptor = open_file(shard.local)
    except FileNotFoundError:
        return None
    share(descriptor)
    status = os.fstat(descriptor)
    if status.st_nlink and shard.size in (None, status.st_size):
        os.utime(shard.local)
        return descriptor
    if status.st_nlink:
        with contextlib.suppress(PermissionError):  # Windows; what is fetched now replaces it
            shard.local.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def _reserve_file(shard: RemoteShard) -> Path:
    return shard.local.with_suffix(".reserve")
