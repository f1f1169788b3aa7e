"""Files that are no files, and files without an end, wherever a command reads one."""

import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from strangers.case import MIB, Case, World, refused_or_right, went_on
from strangers.places import PLACES
from strangers.world import EVALUATE, copy

KIND = "files that are no files"


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(path.name)
    os.chdir(here)


def _holes(path: Path, size: int = 3 << 30) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


THINGS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to the memory of a process": lambda path: path.symlink_to("/proc/self/mem"),
    "3 GB of holes": _holes,
    "nothing": lambda path: None,
    "an empty file": Path.touch,
    "one line of 100 MB": lambda path: path.write_bytes(b"x" * (100 << 20)),
    "a folder without permission": lambda path: path.mkdir(mode=0),
    "a file without permission": lambda path: (path.touch(), path.chmod(0)),
}


def bound_by_permissions() -> None:
    """Root may read everything, unless it gives that up."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(head, held)
    for capability in (1, 2):  # to pass over the permissions of files, and of folders
        libc.prctl(24, capability, 0, 0, 0)
        held[0] &= ~(1 << capability)
        held[1] &= ~(1 << capability)
    libc.capset(head, held)


def iter_cases(world: World) -> Iterator[Case]:
    for where, place in PLACES.items():
        for thing, put in THINGS.items():
            build = place.make(world, lambda path, sound, put=put: put(path))
            bound = bound_by_permissions if "permission" in thing else None
            mapped = 3400 if "holes" in thing and place.holds == "tar" else 0  # pages of a file are no memory
            peak, seconds = (1200 + mapped) * MIB, 90 if "holes" in thing else 30
            yield Case(
                KIND, f"{where}: {thing}", build, check=refused_or_right, prepare=bound, seconds=seconds, peak=peak
            )
    yield Case(KIND, "classify a folder in a circle of links", lambda folder: _circle(world, folder), check=went_on)
    yield Case(KIND, "embed folders 400 deep", lambda folder: _deep(world, folder), check=refused_or_right)
    yield Case(KIND, "embed 20,000 empty files", lambda folder: _many(world, folder), check=went_on, inputs=20_000)
    yield Case(KIND, "evaluate 3,000 empty classes", lambda folder: _classes(world, folder), check=refused_or_right)


def _circle(world: World, folder: Path) -> list[str]:
    copy(world, folder, "set")
    for name in ("set/a/up", "set/b/again"):
        (folder / name).symlink_to("..")
    return ["classify", "set", "--labels", "a", "b", "--model", str(world.model)]


def _deep(world: World, folder: Path) -> list[str]:
    copy(world, folder, "set")
    os.makedirs(folder / "set" / "/".join(["d"] * 400))
    return ["embed", str(world.model), "set", "--out", "out", "--json"]


def _many(world: World, folder: Path) -> list[str]:
    copy(world, folder, "set")
    for number in range(20_000):
        (folder / f"set/a/{number}.png").touch()
    return ["embed", str(world.model), "set", "--out", "out", "--json"]


def _classes(world: World, folder: Path) -> list[str]:
    copy(world, folder, "set", "model", "mine.toml")
    for number in range(3_000):
        (folder / f"set/{number}").mkdir()
    return EVALUATE
