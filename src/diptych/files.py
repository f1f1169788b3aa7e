"""Bytes to disk, all or nothing: write beside, fsync, rename.

A reader sees the old file or the new one, never half of one, also when the machine stops in between.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from diptych.errors import UsageError

_BLOCK = 1 << 20


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


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a new file that appears under its name only when complete; an older one of that name is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
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
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder that appears under its name only when complete; an older one of that name is replaced.

    Every file inside is synced before the rename, so a folder with its final name is whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(temporary)
        if path.exists():
            remove_folder(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder, of which a kill leaves all or a leftover, never a part under its name."""
    leftover = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    os.replace(path, leftover)
    shutil.rmtree(leftover)


def remove_leftovers(folder: Path, name: str = "*", *, dead_only: bool = False) -> None:
    """Delete what killed writers left half-done in `folder`, of one name if it is given.

    Whoever shares the folder with other writers spares, by `dead_only`, those whose process is still there.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        process = leftover.name.removesuffix(".old.tmp").removesuffix(".tmp").rpartition(".")[2]
        if not (dead_only and process.isdigit() and Path("/proc", process).exists()):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
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
