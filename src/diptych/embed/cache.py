"""Features that were computed before, by what they were made of: a bounded folder that processes share.

    cache = FeatureCache(Path("~/.cache/diptych/features").expanduser(), limit=1 << 30)
    space, keys = image_space(loaded, "auto"), [content_key(data) for data in images]
    found = cache.get(space, keys)                              # {key: feature} of those that are there
    cache.put(space, {key: feature})                            # of those that were computed

A key is the space (weights, preprocessing and precision; `image_space`, `text_space`) and a hash of the content.
The store is SQLite in write-ahead mode, so a kill or a power cut leaves
whole entries, and processes of one machine may read and write at once. Every entry carries its checksum: a damaged one
counts as missing and is replaced, a damaged store is begun anew. When it is full, what was not used for longest goes.
Whatever goes wrong with the store costs time, never an answer.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import filelock
import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from diptych.errors import UsageError

LOG = logging.getLogger(__name__)
MIN_LIMIT = 1 << 20
_NAME, _VERSION = "features.sqlite", 1
_CHUNK = 500
"""Keys in one question to the store."""
_FRESH = 3600
"""Seconds for which an entry's last use is not written down again."""
_TABLE = """
create table if not exists feature (
    key blob primary key, value blob not null, checksum integer not null, used integer not null
) without rowid
"""
_COLUMNS = "key, value, checksum, used"


def content_key(content: bytes | str) -> bytes:
    """Names a picture by its encoded bytes, a text by its characters: SHA-256."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")).digest()


class FeatureCache:
    """Features by space and content. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, limit: int = 1 << 30) -> None:
        if limit < MIN_LIMIT:
            raise UsageError(f"a cache of {limit} bytes holds nothing; give it at least {MIN_LIMIT}")
        self.folder, self.limit = folder, limit
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._said = ""

    def get(self, space: str, keys: Iterable[bytes]) -> dict[bytes, Float[Tensor, " E"]]:
        """The features that are there, by key."""
        names = {_entry_key(space, key): key for key in keys}
        return {names[name]: feature for name, feature in self._read(list(names)).items()}

    def put(self, space: str, features: Mapping[bytes, Float[Tensor, " E"]]) -> None:
        """Keep features; what is there under their keys is replaced."""
        if features:
            self._write({_entry_key(space, key): value.float().cpu().numpy() for key, value in features.items()})

    def close(self) -> None:
        """Let go of the store; it is opened again when it is needed."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _read(self, names: list[bytes]) -> dict[bytes, Tensor]:
        found: dict[bytes, Tensor] = {}
        if not names:
            return found

        def read(store: sqlite3.Connection) -> None:
            now, stale, damaged = int(time.time()), [], []
            for start in range(0, len(names), _CHUNK):
                some = names[start : start + _CHUNK]
                marks = ",".join("?" * len(some))
                for name, value, checksum, used in store.execute(
                    f"select {_COLUMNS} from feature where key in ({marks})", some
                ):
                    if not isinstance(value, bytes) or len(value) % 4 or _checksum(name, value) != checksum:
                        damaged.append((name,))
                        continue
                    found[name] = torch.from_numpy(np.frombuffer(value, np.float32).copy())
                    if now - used > _FRESH:
                        stale.append((now, name))
            if damaged:
                LOG.warning("%d damaged entries in %s are computed anew", len(damaged), self.folder)
                store.executemany("delete from feature where key = ?", damaged)
            store.executemany("update feature set used = ? where key = ?", stale)

        self._try(read)
        return found

    def _write(self, fresh: dict[bytes, np.ndarray]) -> None:
        now = int(time.time())
        rows = [(name, value := row.tobytes(), _checksum(name, value), now) for name, row in fresh.items()]

        def write(store: sqlite3.Connection) -> None:
            store.execute("begin immediate")
            store.executemany(f"insert or replace into feature ({_COLUMNS}) values (?, ?, ?, ?)", rows)
            self._make_room(store)

        self._try(write)

    def _make_room(self, store: sqlite3.Connection) -> None:
        """Drop what was not used for longest, a tenth at a time, until the pages in use fit."""
        while True:
            pages, free, size = (
                store.execute(f"pragma {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
            )
            if (pages - free) * size <= self.limit:
                return
            count = store.execute("select count(*) from feature").fetchone()[0]
            if not count:  # what takes the room is not ours
                return
            tenth = count // 10 + 1
            store.execute(
                "delete from feature where key in (select key from feature order by used, key limit ?)",
                (tenth,),
            )

    def _try(self, action: Callable[[sqlite3.Connection], None]) -> None:
        """Do something with the store, in one transaction. If that fails, what it did is lost; the caller goes on."""
        with self._lock:
            try:
                store = self._connect()
                action(store)
                store.commit()
            except (sqlite3.OperationalError, OSError) as error:  # locked too long, a full disk, no permission
                if str(error) != self._said:  # it is tried again at every call, and said once
                    LOG.warning("features are computed and not kept, the cache %s fails: %s", self.folder, error)
                    self._said = str(error)
                self._give_up()
            except sqlite3.DatabaseError as error:
                LOG.warning("the cache %s is damaged and begun anew: %s", self.folder, error)
                self._give_up()
                self._remove_damaged()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._process == os.getpid():  # a connection does not survive a fork
            return self._connection
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            store = sqlite3.connect(self.folder / _NAME, timeout=60, check_same_thread=False)
            store.execute("pragma journal_mode = wal")
            store.execute("pragma synchronous = normal")
            store.execute(f"pragma journal_size_limit = {16 << 20}")
            if store.execute("pragma user_version").fetchone()[0] not in (0, _VERSION):
                store.execute("drop table if exists feature")
            store.execute(_TABLE)
            store.execute(f"pragma user_version = {_VERSION}")
            store.commit()
        self._connection, self._process = store, os.getpid()
        return store

    def _give_up(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self._connection is not None:
                self._connection.close()
        self._connection = None

    def _remove_damaged(self) -> None:
        """Remove a store that cannot be read, unless another process has already done so."""
        with contextlib.suppress(OSError), self._alone():
            with contextlib.suppress(sqlite3.DatabaseError):
                store = sqlite3.connect(self.folder / _NAME, timeout=60)
                try:
                    if store.execute("pragma quick_check(1)").fetchone()[0] == "ok":
                        return
                finally:
                    store.close()
            for ending in ("", "-wal", "-shm"):
                (self.folder / f"{_NAME}{ending}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While a store is opened or removed, no other process does either."""
        with filelock.FileLock(self.folder / "lock", fallback_to_soft=False):
            yield


def _entry_key(space: str, key: bytes) -> bytes:
    return hashlib.sha256(space.encode() + b"\0" + key).digest()


def _checksum(name: bytes, value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(name + value) >> 1  # SQLite's integers have a sign
