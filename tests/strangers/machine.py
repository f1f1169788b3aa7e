"""The machine and the environment: no room, no permission, no home, few open files, odd terminals, closed streams."""

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from strangers.case import Case, Outcome, World, refused_or_right
from strangers.nonfiles import bound_by_permissions
from strangers.places import classify
from strangers.world import EMBED, EVALUATE, FINETUNE, copy

KIND = "environments"
COMMANDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "classify": (("model", "set"), classify()),
    "embed": (("model", "set"), EMBED),
    "evaluate": (("model", "set", "mine.toml"), EVALUATE),
    "finetune": (("model", "foreign.tar"), [*FINETUNE, "--data", "foreign.tar"]),
    "filter": (("crawl",), ["curate", "filter", "--folder", "crawl", "--out", "out", "--processes", "1"]),
}
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no home": {"HOME": None, "DIPTYCH_CACHE": None},
    "a home that is not there": {"HOME": "/proc/nonexistent", "DIPTYCH_CACHE": None},
    "a home that is a file": {"HOME": "mine.toml", "DIPTYCH_CACHE": None},
    "a cache that is a file": {"DIPTYCH_CACHE": "foreign.tar"},
    "a cache on a device": {"DIPTYCH_CACHE": "/dev/null/x"},
    "a terminal of ASCII": {"PYTHONIOENCODING": "ascii"},
    "a terminal of cp1252": {"PYTHONIOENCODING": "cp1252"},
    "an unknown locale": {"LC_ALL": "xx_YY.nothing", "LANG": "xx"},
    "the plain locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "an odd time zone": {"TZ": "Nowhere/Nothing"},
    "a dumb terminal": {"TERM": "dumb", "COLUMNS": "1"},
    "a terminal of no width": {"COLUMNS": "0", "LINES": "0"},
    "a terminal of words": {"COLUMNS": "many"},
    "colours forced": {"NO_COLOR": "1", "FORCE_COLOR": None},
    "threads of words": {"OMP_NUM_THREADS": "many"},
    "ranks of words": {"RANK": "x", "WORLD_SIZE": "y"},
    "no path": {"PATH": ""},
    "a proxy that is none": {"http_proxy": "http://127.0.0.1:1", "https_proxy": "x"},
}


def limit(which: int, most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (most, most))


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _full(descriptor: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def _no_reader() -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def _read_only() -> None:
    bound_by_permissions()
    os.chmod(".", 0o555)


def _nothing_of_linux() -> None:
    """As on other systems: no /proc, no groups of control, and nobody says which cores are ours."""

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

    del os.sched_getaffinity
    sys.addaudithook(refuse)


LIMITS: dict[str, Callable[[], None]] = {
    "files of 4 kB at most": limit(resource.RLIMIT_FSIZE, 4096),
    "files of 100 kB at most": limit(resource.RLIMIT_FSIZE, 100_000),
    "no file at all": limit(resource.RLIMIT_FSIZE, 0),
    "64 open files": limit(resource.RLIMIT_NOFILE, 64),
    "16 open files": limit(resource.RLIMIT_NOFILE, 16),
    "a folder that cannot be written": _read_only,
    "a mask that hides all": lambda: os.umask(0o777) and None,
    "nothing that only Linux has": _nothing_of_linux,
    "a mask of 077": lambda: os.umask(0o077) and None,
}
STREAMS: dict[str, Callable[[], None]] = {
    "stdout closed": partial(_close, 1),
    "stdin closed": partial(_close, 0),
    "stdin and stdout closed": partial(_close, 0, 1),
    "stdout on a full disk": partial(_full, 1),
    "stdout without a reader": _no_reader,
}


def iter_cases(world: World) -> Iterator[Case]:
    for command, (needs, arguments) in COMMANDS.items():
        make = partial(_make, world, needs, arguments)
        for what, prepare in LIMITS.items():
            yield Case(KIND, f"{command}: {what}", make, check=refused_or_right, prepare=prepare)
    for number, (what, env) in enumerate(ENVIRONMENTS.items()):  # each by one command, all commands by turns
        command, (needs, arguments) = list(COMMANDS.items())[number % len(COMMANDS)]
        make = partial(_make, world, needs, arguments)
        yield Case(KIND, f"{command}: {what}", make, check=refused_or_right, env=env)
    for what, prepare in STREAMS.items():
        make = partial(_make, world, *COMMANDS["classify"])
        codes = frozenset({0, 1, 2, 120, 141})
        yield Case(KIND, f"classify: {what}", make, codes=codes, check=_ended, prepare=prepare, own=True)


def _make(world: World, needs: tuple[str, ...], arguments: list[str], folder: Path) -> list[str]:
    copy(world, folder, *needs)
    return arguments


def _ended(outcome: Outcome) -> str | None:
    return (
        "it said nothing of what it could not write"
        if outcome.code and outcome.code < 100 and not outcome.err
        else None
    )
