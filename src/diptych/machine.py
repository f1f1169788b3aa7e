"""What operating systems do in their own ways, or not at all, and what is done where it is missing.

Elsewhere nothing asks which system this is. docs/machines.md says what was tested on which.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

HAS_LIMITS = resource is not None
"""Whether the kernel ends a process that takes more time or memory than it may."""
BUSY = 0.5
"""Cores that other programs want, from which they are looked after."""
UNKNOWN_MEMORY = 4 << 30
"""Bytes that are taken for free where the system does not say."""
_SEEK = threading.Lock()


def count_cores() -> int:
    """Cores that this process may use; those of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Beside busy programs let threads of OpenMP sleep while they wait for each other; before torch is imported.

    By default they spin, which is quicker alone and many times slower on cores that others want; docs/machines.md has
    figures. What the user chose stays.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    if not chosen and "torch" not in sys.modules and busy_cores() >= BUSY:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def busy_cores() -> float:
    """How many cores were wanted in the last minute, by all programs; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Most memory that this process has held so far, bytes; 0 where the system does not say."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    """Bytes that this process may still take, of the machine and of its control group.

    Of a system that tells its size alone half of that; UNKNOWN_MEMORY of one that tells nothing.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):
            free = UNKNOWN_MEMORY
    with contextlib.suppress(OSError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text("ascii")))
    return free


def limit_memory(size: int) -> None:
    """Let this process ask for no more than `size` bytes, and leave no image of them behind. macOS may refuse that."""
    assert resource is not None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


# --- files ------------------------------------------------------------------------------------------------------------


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file's bytes as they are."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of a file from an offset on, from any number of threads."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _SEEK, _place(descriptor, offset):
        return os.read(descriptor, size)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Put all of `data` into a file, from an offset on."""
    rest = memoryview(data)
    while rest:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, rest, offset)
        else:
            with _SEEK, _place(descriptor, offset):
                written = os.write(descriptor, rest)
        rest, offset = rest[written:], offset + written


@contextlib.contextmanager
def _place(descriptor: int, offset: int) -> Iterator[None]:
    """The descriptor at an offset, and back where it was: who reads on does not see it."""
    before = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, offset, os.SEEK_SET)
    try:
        yield
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)


def share(descriptor: int) -> None:
    """Keep a file from `remove_unshared` as long as it is open; Windows keeps any open file."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def remove_unshared(path: Path) -> bool:
    """Remove a file that nobody shares; whether it is gone."""
    if fcntl is None:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            return False
        return True
    import filelock  # not in the parser's process, which starts often

    try:
        descriptor = open_file(path)
    except FileNotFoundError:
        return True
    try:
        if not filelock.lock_descriptor(descriptor, blocking=False):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def widen_pipe(pipe: IO[bytes], size: int) -> None:
    """Let a pipe hold so many bytes, where the system grants it: fewer turns for whoever fills it."""
    if fcntl is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)
