"""Runs cases, each in a process of its own that is watched: its memory, its time, what it prints, starts and writes.

Most cases are forked from a process that has imported what commands need, which saves each a second; those about the
environment get an interpreter of their own.
"""

import contextlib
import ctypes
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from strangers.case import MIB, Case, Outcome
from strangers.watch import watch

TESTS = Path(__file__).parents[1]
SPACE = 48 << 30
"""Bytes of address space of a process, most of which are libraries and reservations of threads."""
LONGEST = 5000
"""Bytes of a line."""
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NO_MEMORY = re.compile("not enough memory|out_of_memory|MemoryError|Cannot allocate")
_UNMADE = 99


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    case: Case
    wrong: str
    """Nothing, if all was right."""
    peak: int
    seconds: float
    code: int
    err: str


def run_cases(cases: Iterable[Case], shared: Path, jobs: int = 2) -> Iterator[Verdict]:
    """Verdicts in the order in which the cases end."""
    waiting, running = list(reversed(list(cases))), []
    sound = fingerprint(shared)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Running(waiting.pop()))
            time.sleep(0.01)
            for one in list(running):
                if one.has_ended():
                    running.remove(one)
                    yield one.judge()
    finally:
        for one in running:
            one.kill("stopped")
            shutil.rmtree(one.place, ignore_errors=True)
    if fingerprint(shared) != sound:
        raise AssertionError(f"a case changed {shared}, which was not its own")


def fingerprint(folder: Path) -> str:
    """Of every name and every byte below a folder."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _Running:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.place = Path(tempfile.mkdtemp(prefix="strangers-"))
        self.place.chmod(0o755)
        for name in ("here", "beside", "told", "tmp"):
            (self.place / name).mkdir()
        (self.place / "beside" / "thesis.txt").write_text("three years of work")
        self.started, self.stopped, self.peak = time.monotonic(), "", 0
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            _be(self.case, self.place)

    def has_ended(self) -> bool:
        process, self.status, usage = os.wait4(self.process, os.WNOHANG)
        self.seconds = time.monotonic() - self.started
        if process:
            self.peak = max(self.peak, usage.ru_maxrss * 1024)
            with contextlib.suppress(ProcessLookupError):  # what it left running
                os.killpg(self.process, signal.SIGKILL)
            return True
        with contextlib.suppress(OSError, ValueError, IndexError):
            now = int(Path(f"/proc/{self.process}/statm").read_text().split()[1]) * resource.getpagesize()
            self.peak = max(self.peak, now)
        if self.peak > self.case.peak:
            self.kill(f"memory: more than {self.case.peak // MIB} MiB")
        elif self.seconds > self.case.seconds:
            self.kill(f"hang: more than {self.case.seconds:.0f} s")
        return False

    def kill(self, why: str) -> None:
        self.stopped = self.stopped or why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def judge(self) -> Verdict:
        told = self.place / "told"
        out, err = ((told / name).read_bytes() if (told / name).exists() else b"" for name in ("out", "err"))
        code = os.waitstatus_to_exitcode(self.status)
        here = self.place / "here"
        text = [stream.decode("utf-8", "surrogateescape") for stream in (out, err)]
        outcome = Outcome(code, *text, here, self.peak, self.seconds)
        try:
            wrong = self.stopped or self._find_wrong(outcome, out + err)
        finally:
            shutil.rmtree(self.place, ignore_errors=True)
        return Verdict(self.case, wrong, self.peak, self.seconds, code, outcome.err[-2000:])

    def _find_wrong(self, outcome: Outcome, printed: bytes) -> str:
        both = outcome.out + outcome.err
        if outcome.code == _UNMADE:
            return f"the case could not be made: {outcome.err[-500:]}"
        if "Traceback (most recent call last)" in both:
            return f"traceback: {outcome.err.strip().splitlines()[-1][:300]}"
        if outcome.code < 0:
            return f"crash: signal {-outcome.code}"
        if outcome.code not in self.case.codes:
            return f"exit code {outcome.code}: {both[-300:]!r}"
        if found := _STEERS.search(both):
            return f"{found[0]!r} was printed raw: {both[max(0, found.start() - 60) : found.end() + 60]!r}"
        if any(len(line) > LONGEST for line in outcome.err.encode("utf-8", "replace").splitlines()):
            return "a line without an end"
        if self.case.peak < self.peak:
            return f"memory: {self.peak // MIB} MiB"
        if not self.case.may_lack_memory and _NO_MEMORY.search(both):
            return f"memory ran out: {both[-300:]!r}"
        notes = self.place / "told" / "notes"
        if notes.exists() and (told := notes.read_text()):
            return f"not allowed: {told.splitlines()[0]}"
        thesis = self.place / "beside" / "thesis.txt"
        names = sorted(path.name for path in self.place.iterdir()) + os.listdir(self.place / "beside")
        if names != ["beside", "here", "tmp", "told", "thesis.txt"] or thesis.read_text() != "three years of work":
            return f"something beside its folder changed: {names}"
        try:
            return (self.case.check and self.case.check(outcome)) or ""
        except Exception as error:  # output that is not even JSON
            return f"{type(error).__name__}: {error}; printed {printed[-300:]!r}"


def _be(case: Case, place: Path) -> None:
    """Become the case; never returns."""
    code = 1
    try:
        os.setsid()
        main = sys.modules["__main__"]  # which processes of the command are not to import
        main.__spec__, main.__file__ = None, str(TESTS / "strangers" / "watch.py")
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with whoever started it
        here, told = place / "here", place / "told"
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(here)
        os.environ.update(
            {
                "HOME": str(here / "home"),
                "TMPDIR": str(place / "tmp"),
                "DIPTYCH_CACHE": str(here / "cache"),
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "100",
                "HF_HUB_OFFLINE": "1",
            }
        )
        tempfile.tempdir = None
        try:
            arguments = case.make(here)
        except BaseException:
            traceback.print_exc()
            os._exit(_UNMADE)
        Path("/proc/self/clear_refs").write_text("5")  # what making it took is not the command's memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
        if case.env or case.own:
            for name, value in case.env.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if case.prepare:
                case.prepare()
            command = [
                sys.executable,
                "-m",
                "strangers.watch",
                str(told / "notes"),
                f"{here}:{place / 'tmp'}",
                *arguments,
            ]
            os.execv(sys.executable, command)
        if case.prepare:
            case.prepare()
        watch(told / "notes", [here, place / "tmp"])
        code = _call(arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _call(arguments: list[str]) -> int:
    from diptych.cli import main

    sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", 0, closefd=False), write_through=True) for n in (1, 2))
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
