"""Folders held by one process, names that stand for several files, and bytes to disk, all or nothing: write beside,
fsync, rename.

A reader sees the old file or the new one, never half of one, also when the machine stops in between.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import xxhash

from diptych.errors import RunLockedError, UsageError
from diptych.machine import open_file

MAX_JSON = 64 << 20
"""Bytes of a JSON file that are read; whatever needs more is not one of ours."""
MAX_NESTING = 100
_TOO_DEEP = "it is nested too deeply"
MAX_TABLE = 256 << 20
"""Bytes of a table or a list in text that is read as a whole."""
MAX_LINE = 1 << 20
"""Bytes of a line of text; a longer one is none."""
_BLOCK = 1 << 20
_RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
MAX_RANGE = 1_000_000
"""Files that the ranges of a name may stand for."""


def spell_out(place: str) -> list[str]:
    """The files that a name stands for: those of its ranges, in their order, and those that globs match, sorted.

    A file that is there stands for itself, whatever signs are in its name.
    """
    found: list[str] = []
    for name in [place] if os.path.exists(place) else expand_range(place):
        found += expand_glob(name) if not os.path.exists(name) and is_glob(name) else [name]
    return list(dict.fromkeys(found))


def expand_range(place: str) -> list[str]:
    """`a/{00..02}.tar` -> a/00.tar, a/01.tar, a/02.tar; any number of ranges."""
    parts = _RANGE.split(place)
    ends = list(zip(parts[1::3], parts[2::3], strict=True))
    counts = [int(last) - int(first) + 1 for first, last in ends]
    if any(count < 1 for count in counts):
        raise UsageError(f"the range in {place} is empty; the smaller number comes first")
    if math.prod(counts) > MAX_RANGE:
        raise UsageError(f"{place} stands for {math.prod(counts):,} files, at most {MAX_RANGE:,}")
    choices = [[f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)] for first, last in ends]
    return ["".join(x for pair in itertools.zip_longest(parts[::3], some, fillvalue="") for x in pair)
            for some in itertools.product(*choices)]  # fmt: skip


def is_glob(name: str) -> bool:
    """Whether a name has signs that match others."""
    return any(sign in name for sign in "*?[")


def expand_glob(pattern: str) -> list[str]:
    """Files that a pattern matches, sorted, without hidden ones.

    `**` is any depth of folders, without those that links lead to: links may lead in circles. OSError for a folder
    that cannot be listed, whose files would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    parts = pattern.split("/")
    if "**" not in parts:
        return sorted(name for name in glob.glob(pattern) if not os.path.isdir(name))
    depth = parts.index("**")
    behind = "/".join(parts[depth + 1 :]) or "*"
    found: set[str] = set()
    for root in glob.glob("/".join(parts[:depth]) or "/") if depth else [""]:
        for folder, folders, _ in os.walk(root or os.curdir, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            place = glob.escape(os.path.relpath(folder, root) if not root else folder).removeprefix("./")
            found.update(expand_glob(behind if place == os.curdir else os.path.join(place, behind)))
    return sorted(found)


def make_folder(path: Path, *, flag: str = "--out") -> None:
    """Make a folder for results, with those above it, if it is not there; UsageError unless files can be made in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UsageError(f"cannot make the folder {path}: it is a file; name another {flag}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"cannot make the folder {path}: {reason}; name another {flag}") from None


def cache_folder(part: str) -> Path:
    """The folder for one kind of what can be made again: $DIPTYCH_CACHE/part, else in the user's cache folder.

    Whoever keeps something there must do without where it cannot be written. Raises OSError for a user without a home.
    """
    if own := os.environ.get("DIPTYCH_CACHE"):
        return Path(own) / part
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / part
    except RuntimeError as error:
        raise OSError(str(error)) from None


@contextlib.contextmanager
def hold_folder(folder: Path, *, flag: str = "--out") -> Iterator[None]:
    """Make a folder and hold it through its file `.lock`; RunLockedError, naming the holder, if another process does.

    The lock ends with the process, however it ends. Where the file system knows no locks, that is an OSError: a lock
    file that outlives a killed process would shut its owner out.
    """
    is_new = not folder.exists()
    make_folder(folder, flag=flag)
    path = folder / ".lock"
    try:
        with filelock.FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=_sign):
            yield
    except filelock.Timeout:
        holder = "unknown"
        with contextlib.suppress(OSError):  # Windows lets nobody else read a locked file
            holder = path.read_text("utf-8", "replace").strip() or holder
        raise RunLockedError(
            f"{folder} is in use by another process ({holder}); wait for it, stop it, or name another {flag}"
        ) from None
    finally:
        if is_new and [*folder.iterdir()] == [path]:  # what was refused leaves nothing behind
            path.unlink()
            folder.rmdir()


def _sign(lock: int) -> None:
    """Write who holds a lock into its file."""
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}\n".encode())


def parse_json(data: bytes | str, **options: Any) -> Any:
    """JSON of unknown origin; ValueError for all that is none: its encoding, its depth, its numbers.

    Whoever compares, prints or writes it again walks it in recursion: what is nested over MAX_NESTING deep is refused.
    """
    try:
        value = json.loads(data, **options)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    brackets = data.count("[") + data.count("{") if isinstance(data, str) else data.count(b"[") + data.count(b"{")
    level = [value] if brackets > MAX_NESTING else []
    for _ in range(MAX_NESTING):
        holders = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = list(itertools.chain.from_iterable(holders))
    if level:
        raise ValueError(_TOO_DEEP)
    return value


def require_file(path: str | Path) -> None:
    """UsageError for a pipe, socket or device, which never end; what is not there is let pass."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a pipe, socket or device; save what comes out of it as a file, and name that")


def read_bytes(path: Path, most: int = MAX_JSON) -> bytes:
    """A file as a whole; UsageError if it is none or holds more than `most` bytes. OSError as `open` raises it."""
    require_file(path)
    with open(path, "rb") as file:
        data = b"" if os.fstat(file.fileno()).st_size > most else file.read(most + 1)
        if (not data and file.read(1)) or len(data) > most:
            raise UsageError(f"{path} has more than {most:,} bytes")
    return data


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """`read_bytes` as UTF-8, with or without a mark at its beginning; UsageError if it is not."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from None


def iter_lines(file: Any) -> Iterator[bytes | None]:
    """Lines of an open file of bytes, with their ends, in bounded memory; None for one of MAX_LINE bytes or more.

    Behind each line `file.tell()` is where the next one begins.
    """
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
            pass
        yield None


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError if it is none, or holds more than MAX_JSON bytes. OSError as `open` raises it."""
    return parse_json(read_bytes(path, MAX_JSON))


def _beside(path: Path, ending: str = "") -> Path:
    """A new name for what is not complete, that no other process, container or thread takes."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}{ending}.tmp")


_LEFTOVER = re.compile(r"\..+\.(\d+|[0-9a-f]{16})(\.old)?\.tmp")  # numbers: by process, as in version 0.1


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a new file that appears under its name only when complete; an older one of that name is replaced."""
    temporary = _beside(path)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people and machines, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # of a file name that is not UTF-8
        text = json.dumps(data, indent=2) + "\n"
    write_bytes(path, text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder that appears under its name only when complete; an older one of that name is replaced.

    Every file inside is synced before the rename, so a folder with its final name is whole.
    """
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                sync_file(file)
        sync_folder(temporary)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(new: Path, path: Path) -> None:
    """Give a complete folder its name; the old one of that name, if any, is deleted.

    A kill leaves the old one, the new one, or neither under its name: then `remove_leftovers` gives the old one back.
    """
    old = _beside(path, ".old")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    if old.exists():
        doomed = _beside(path)
        os.replace(old, doomed)
        shutil.rmtree(doomed)


def remove_folder(path: Path) -> None:
    """Delete a folder, of which a kill leaves all or a leftover, never a part under its name."""
    leftover = _beside(path)
    os.replace(path, leftover)
    shutil.rmtree(leftover)


def remove_leftovers(folder: Path, name: str = "", *, older_than: float = 0) -> None:
    """Delete what killed writers left half-done in `folder`, or of the one file or folder called `name`.

    A folder whose successor never got its name gets it back. Links and files of others that end in .tmp stay. Whoever
    shares the folder with other writers spares by `older_than` (seconds) what they may be writing.
    """
    for leftover in folder.glob(f".{glob.escape(name) or '*'}.*.tmp"):
        if not _LEFTOVER.fullmatch(leftover.name) or leftover.is_symlink():
            continue
        if older_than and leftover.stat().st_mtime > time.time() - older_than:
            continue
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        named = folder / leftover.name[1:].rsplit(".", 3)[0]
        if leftover.name.endswith(".old.tmp") and not named.exists():
            os.replace(leftover, named)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    try:
        descriptor = open_file(path, os.O_RDWR)  # Windows wants it open for writing
    except PermissionError:
        descriptor = open_file(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where the system opens folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def xxh3(path: Path) -> str:
    """Fast 128-bit hash of a file (XXH3), hex: guards against accidents, checked on every load."""
    return _hash_file(path, xxhash.xxh3_128())


def digest(text: str) -> str:
    """Short name of a text (XXH3, hex)."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def sha256(path: Path) -> str:
    """Cryptographic hash of a file, hex: guards against tampering."""
    return _hash_file(path, hashlib.sha256())


def _hash_file(path: Path, digest: Any) -> str:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
