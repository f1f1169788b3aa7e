"""The parser's own process: a page that hangs, crashes or eats memory costs that page only.

Pages go over in batches, so that the price of talking is shared by many. The kernel ends the process when one page
has taken its share of processor time, or when the process asks for more memory than it may have; the parent reads
from a page of shared memory which page that was, starts another process, and sends what had not been answered again.

    python -m diptych.curate.pages.sandbox     is that process: it is given its end of the talk by `Parser`
"""

import io
import mmap
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from diptych import machine
from diptych.curate.pages.page import Page
from diptych.errors import DiptychError, UsageError

PAGE_TIME = "page_time"
PAGE_MEMORY = "page_memory"
PAGE_CRASH = "page_crash"
PAGE_ERROR = "page_error"

_LENGTH = struct.Struct("<q")
_STARTS = 3
_PIPE = 1 << 20
_OUT_OF_MEMORY = 77  # exit code
_STILL_SECONDS = 60.0

Answer = list[list[Any]] | str
"""What was found on a page, in columns, or the reason that nothing was."""


class ParserStartError(DiptychError):
    """The parser's process does not start; the message says what it wrote."""


class _Died(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Parser:
    """Calls `extract` (picklable) on pages, in a process that is replaced whenever a page ends it."""

    def __init__(self, extract: Callable[[Page], Any], *, page_seconds: float, memory: int) -> None:
        if not machine.HAS_LIMITS:
            raise UsageError("web pages are read on Linux and macOS: this system sets no limits to a harmful page")
        self._setup = pickle.dumps((extract, page_seconds, memory))
        self._still = max(_STILL_SECONDS, 10 * page_seconds)
        self._process: subprocess.Popen[bytes] | None = None
        self._shared_file = tempfile.TemporaryFile()  # noqa: SIM115  as long as this object
        self._shared_file.truncate(mmap.PAGESIZE)
        self._shared = mmap.mmap(self._shared_file.fileno(), mmap.PAGESIZE)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.replaced = 0
        """Processes that a page ended."""

    def __enter__(self) -> "Parser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._end()
        self._shared.close()
        self._shared_file.close()
        self._errors.close()

    def __call__(self, pages: Sequence[Page]) -> list[Answer]:
        """An answer for each page, in order."""
        answers: list[Answer] = []
        failed = 0
        while len(answers) < len(pages):
            rest = pages[len(answers) :]
            fresh = self._process is None
            try:
                answers += self._ask(rest)
            except _Died as died:
                place = self._progress()
                self._end()
                if place < 0:
                    failed += 1
                    if failed == _STARTS:
                        raise ParserStartError(f"the parser does not start: {self._last_words()}") from None
                elif place == 0 and fresh:
                    self.replaced += 1
                    answers.append(died.reason)
                else:  # what this page does must not depend on those before it: it gets a process of its own
                    answers += self(rest[:place])
                    self._end()
        return answers

    def _ask(self, pages: Sequence[Page]) -> list[Answer]:
        process = self._process or self._start()
        assert process.stdin is not None
        self._set_progress(-1)
        fields = [(page.kind, page.url, page.charset, page.robots, page.body) for page in pages]
        try:
            _write(process.stdin, pickle.dumps(fields, protocol=5))
        except BrokenPipeError:
            raise _Died(self._cause(process)) from None
        (length,) = _LENGTH.unpack(self._read(process, _LENGTH.size))
        return orjson.loads(self._read(process, length))

    def _start(self) -> subprocess.Popen[bytes]:
        self._set_progress(-1)
        package = str(Path(__file__).resolve().parents[3])
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "diptych.curate.pages.sandbox", str(self._shared_file.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            pass_fds=[self._shared_file.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        machine.widen_pipe(self._process.stdin, _PIPE)
        try:
            _write(self._process.stdin, self._setup)
        except BrokenPipeError:
            raise _Died(PAGE_CRASH) from None
        return self._process

    def _read(self, process: subprocess.Popen[bytes], size: int) -> bytearray:
        """Bytes from the process; it is ended if it neither answers nor goes on to another page."""
        assert process.stdout is not None
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(data) < size:
                place, started = self._progress(), time.monotonic()
                while not selector.select(1.0):
                    if self._progress() != place:
                        place, started = self._progress(), time.monotonic()
                    elif time.monotonic() - started > self._still:
                        raise _Died(PAGE_TIME)
                piece = os.read(process.stdout.fileno(), min(size - len(data), 1 << 20))
                if not piece:
                    raise _Died(self._cause(process))
                data += piece
        return data

    def _cause(self, process: subprocess.Popen[bytes]) -> str:
        return {-signal.SIGPROF: PAGE_TIME, _OUT_OF_MEMORY: PAGE_MEMORY}.get(process.wait(), PAGE_CRASH)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _progress(self) -> int:
        return _LENGTH.unpack_from(self._shared)[0]

    def _set_progress(self, value: int) -> None:
        _LENGTH.pack_into(self._shared, 0, value)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"


def _write(pipe: IO[bytes], data: bytes) -> None:
    """All of it, after its length; the pipe has no buffer of its own."""
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[pipe.write(view) :]


def _read_exactly(pipe: io.FileIO, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = pipe.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def _receive(pipe: io.FileIO) -> Any:
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    return pickle.loads(_read_exactly(pipe, length))


def serve(shared: mmap.mmap, source: io.FileIO, target: IO[bytes]) -> None:
    """The process: batches in, answers out, until nobody asks any more."""
    extract: Callable[[Page], Sequence[Sequence[Any]] | str]
    extract, page_seconds, memory = _receive(source)
    machine.limit_memory(memory)
    while True:
        try:
            batch = _receive(source)
        except EOFError:
            return
        answers: list[Any] = []
        for place, fields in enumerate(batch):
            _LENGTH.pack_into(shared, 0, place)
            signal.setitimer(signal.ITIMER_PROF, page_seconds)  # ends the process, also inside of a library
            answers.append(_try(extract, Page(*fields)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(target, orjson.dumps(answers))


def _try(extract: Callable[[Page], Sequence[Sequence[Any]] | str], page: Page) -> Any:
    try:
        found = extract(page)
        return found if isinstance(found, str) else orjson.Fragment(orjson.dumps(list(found)))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)  # what is left of this process cannot be trusted with the next page
    except Exception:  # of any kind, from a page meant to harm: it costs this page
        return PAGE_ERROR


def main() -> None:
    """Talk over the standard streams; nothing else may write to them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    source, target = io.FileIO(os.dup(0)), io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    serve(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE), source, target)


if __name__ == "__main__":
    main()
