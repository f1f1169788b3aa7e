"""What became of every address, and the bytes of every picture: the memory of a fetch, which survives `kill -9`.

    ledger/0000/ledger.sqlite    one row an address: not tried, stored (where, how long, SHA-256), or why not
    ledger/0000/00000.pack       bytes of pictures end to end; a run begins a pack of its own, so none is written twice

The bytes are written before the row that points to them, and a row is committed as soon as its picture is whole. So a
kill loses what was under way and nothing else. After a loss of power the last rows may point to bytes that never
reached the disk: rows behind the last sync are checked when the ledger is opened, and those that do not hold are
tried again.

A ledger belongs to one partition of the hosts and is written by one process.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych import files
from diptych.curate.fetch.outcomes import DELETED, OK, TRANSIENT
from diptych.curate.fetch.schedule import host_of
from diptych.errors import ShardError
from diptych.machine import open_file, read_at, write_at

PACK_BYTES = 1 << 30
"""A pack is closed when it is this long."""
SYNC_SECONDS = 5.0
"""How often packs are made durable while pictures arrive."""
_PAGE = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS urls (
    id BLOB PRIMARY KEY, url TEXT NOT NULL, outcome TEXT, detail TEXT, final_url TEXT, sha256 TEXT,
    pack INTEGER, start INTEGER, size INTEGER, tries INTEGER NOT NULL DEFAULT 0, again_at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS robots (origin TEXT PRIMARY KEY, read_at REAL NOT NULL, text TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS synced (one INTEGER PRIMARY KEY CHECK (one = 1), pack INTEGER, start INTEGER);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What became of one address."""

    outcome: str
    """`ok` or a reason."""
    final_url: str | None = None
    """Where the picture was, if that is another address than the one asked."""
    sha256: str | None = None
    """SHA-256 of the bytes as they came."""
    pack: int = 0
    start: int = 0
    size: int = 0
    """Bytes."""


def partition_of(url: str, partitions: int) -> int:
    """The partition that an address belongs to; all addresses of a host are in one."""
    host = host_of(url).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(host, digest_size=8).digest(), "big") % partitions


def _id(url: str) -> bytes:
    return hashlib.blake2b(url.encode(errors="surrogatepass"), digest_size=16).digest()


class Ledger:
    """One partition, open for writing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(files.hold_folder(folder))
        self._db = self._stack.enter_context(contextlib.closing(_connect(folder)))
        self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _SCHEMA)
        packs = [int(path.stem) for path in folder.glob("*.pack")]
        self._pack = max(packs, default=-1)
        self._end = 0
        self._file: int | None = None
        self._synced_at = time.monotonic()
        self._check_tail()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, urls: Iterable[str]) -> None:
        """Plan addresses; those that are known stay as they are."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR IGNORE INTO urls (id, url) VALUES (?, ?)", ((_id(url), url) for url in urls)
            )

    def iter_open(self, retry: str = "none", now: float | None = None) -> Iterator[str]:
        """Addresses to try: those not tried yet and, as `retry` says, failures; in an order that mixes hosts."""
        again = {"none": "0", "failed": f"outcome NOT IN ('{OK}', '{DELETED}')", "transient": _transient_sql()}[retry]
        where = f"id > ? AND (outcome IS NULL OR ({again} AND COALESCE(again_at, 0) <= ?))"
        last = b""
        while rows := self._db.execute(
            f"SELECT id, url FROM urls WHERE {where} ORDER BY id LIMIT {_PAGE}", (last, now or time.time())
        ).fetchall():
            last = rows[-1][0]
            yield from (url for _, url in rows)

    def store(self, url: str, data: bytes, *, sha256: str, final_url: str | None, tries: int) -> None:
        """Keep a picture."""
        if self._file is None or self._end >= PACK_BYTES:
            self._begin_pack()
        assert self._file is not None
        write_at(self._file, data, self._end)
        self._db.execute(
            "UPDATE urls SET outcome = ?, detail = NULL, final_url = ?, sha256 = ?, pack = ?, start = ?, size = ?,"
            " tries = tries + ?, again_at = NULL WHERE id = ?",
            (OK, final_url, sha256, self._pack, self._end, len(data), tries, _id(url)),
        )
        self._end += len(data)
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def fail(self, url: str, reason: str, *, detail: str, tries: int, again_at: float | None = None) -> None:
        """Note why there is no picture; `again_at` is the time before which the host does not want to be asked."""
        self._db.execute(
            "UPDATE urls SET outcome = ?, detail = ?, tries = tries + ?, again_at = ? WHERE id = ?",
            (reason, detail[:200], tries, again_at, _id(url)),
        )

    def forget(self, url: str) -> bool:
        """Overwrite the bytes of a picture and never ask for it again; False for an address that is not known."""
        row = self._db.execute("SELECT outcome, pack, start, size FROM urls WHERE id = ?", (_id(url),)).fetchone()
        if row is None:
            return False
        outcome, pack, start, size = row
        if outcome == OK:
            with open(self.folder / f"{pack:05d}.pack", "r+b") as file:
                file.seek(start)
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())
        self._db.execute(
            "UPDATE urls SET outcome = ?, detail = NULL, final_url = NULL, sha256 = NULL, pack = NULL, start = NULL,"
            " size = NULL, again_at = NULL WHERE id = ?",
            (DELETED, _id(url)),
        )
        return True

    def robots(self, origin: str, max_age: float) -> str | None:
        """The robots.txt of an origin (`` if it has none), if it was read less than `max_age` seconds ago."""
        row = self._db.execute("SELECT read_at, text FROM robots WHERE origin = ?", (origin,)).fetchone()
        return row[1] if row is not None and 0 <= time.time() - row[0] < max_age else None

    def keep_robots(self, origin: str, text: str) -> None:
        """Remember a robots.txt."""
        self._db.execute("REPLACE INTO robots VALUES (?, ?, ?)", (origin, time.time(), text))

    def counts(self) -> Counter[str]:
        """Outcome -> addresses; not tried ones count as ``."""
        return Counter(dict(self._db.execute("SELECT COALESCE(outcome, ''), COUNT(*) FROM urls GROUP BY 1")))

    def sync(self) -> None:
        """Make durable what was stored, and remember how far."""
        if self._file is not None:
            os.fsync(self._file)
            self._db.execute("REPLACE INTO synced VALUES (1, ?, ?)", (self._pack, self._end))
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and let go."""
        self.sync()
        self._close_pack()
        self._stack.close()

    def _begin_pack(self) -> None:
        self.sync()
        self._close_pack()
        self._pack, self._end = self._pack + 1, 0
        self._file = open_file(self.folder / f"{self._pack:05d}.pack", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        files.sync_folder(self.folder)

    def _close_pack(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _check_tail(self) -> None:
        """Hold rows behind the last sync against the bytes; those that do not fit are open again."""
        pack, start = self._db.execute("SELECT pack, start FROM synced").fetchone() or (0, 0)
        rows = self._db.execute(
            "SELECT id, sha256, pack, start, size FROM urls WHERE outcome = ? AND (pack, start) >= (?, ?)",
            (OK, pack, start),
        ).fetchall()
        lost = [row[0] for row in rows if not _holds(self.folder, *row[1:])]
        self._db.executemany("UPDATE urls SET outcome = NULL WHERE id = ?", [(one,) for one in lost])


class Reader:
    """Any number of partitions, open for reading; for one thread of one process."""

    def __init__(self, folder: Path, partitions: int) -> None:
        self._folders = [folder / f"{i:04d}" for i in range(partitions)]
        self._dbs: dict[int, sqlite3.Connection] = {}
        self._packs: dict[tuple[int, int], int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for db in self._dbs.values():
            db.close()
        for descriptor in self._packs.values():
            os.close(descriptor)

    def find(self, url: str) -> Entry | None:
        """What became of an address, None if it was not tried."""
        place = partition_of(url, len(self._folders))
        if place not in self._dbs:
            self._dbs[place] = _connect(self._folders[place])
        row = (
            self._dbs[place]
            .execute("SELECT outcome, final_url, sha256, pack, start, size FROM urls WHERE id = ?", (_id(url),))
            .fetchone()
        )
        if row is None or row[0] is None:
            return None
        outcome, final_url, sha256, pack, start, size = row
        if outcome != OK:
            return Entry(outcome=outcome)
        return Entry(outcome=OK, final_url=final_url, sha256=sha256, pack=pack, start=start, size=size)

    def read(self, url: str, entry: Entry) -> bytes | None:
        """The bytes of a stored picture, None if they are not what was stored."""
        place = partition_of(url, len(self._folders)), entry.pack
        if place not in self._packs:
            try:
                self._packs[place] = open_file(self._folders[place[0]] / f"{entry.pack:05d}.pack")
            except FileNotFoundError:
                return None
        data = read_at(self._packs[place], entry.size, entry.start)
        return data if hashlib.sha256(data).hexdigest() == entry.sha256 else None


def _connect(folder: Path) -> sqlite3.Connection:
    path = folder / "ledger.sqlite"
    store = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        store.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        store.close()
        raise ShardError(f"{path} is damaged ({error}); put it back, or fetch into another folder") from None
    return store


def _holds(folder: Path, sha256: str, pack: int, start: int, size: int) -> bool:
    try:
        with open(folder / f"{pack:05d}.pack", "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(size)).hexdigest() == sha256
    except FileNotFoundError:
        return False


def _transient_sql() -> str:
    names: Collection[str] = sorted(TRANSIENT)
    listed = ", ".join(f"'{name}'" for name in names)
    return f"(outcome IN ({listed}, 'http_408', 'http_429') OR outcome GLOB 'http_5[0-9][0-9]')"
