"""What commands print: lines that are safe on a terminal, counts in words, and progress that also fits a log."""

import os
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from diptych.errors import install

LINE_SECONDS = 30.0
"""Time between two lines of progress where stderr is no terminal."""
MAX_LINE = 2000
"""Characters of a line about something that went wrong."""
_JOINERS = "\u200c\u200d"  # of emoji and of Persian words: harmless, though Python calls them unprintable


def printable(text: object) -> str:
    """A text of unknown origin as a line: what could steer the terminal is shown as its escape.

    >>> printable("a\\x1b[2Jb"), printable("année 犬")
    ('a\\\\x1b[2Jb', 'année 犬')
    """
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in str(text))


def shorten(text: object, most: int = MAX_LINE) -> str:
    """`printable`, cut where it goes on too long."""
    line = printable(text)
    return line if len(line) <= most else f"{line[:most]} ... ({len(line):,} characters)"


def counted(number: int, noun: str) -> str:
    """A number with its noun, of which there may be one.

    >>> counted(1, "input"), counted(2000, "input")
    ('1 input', '2,000 inputs')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def list_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, the largest first.

    >>> list_counts({"truncated": 2, "empty": 3000})
    'empty 3,000, truncated 2'
    """
    ranked = sorted((-count, name) for name, count in counts.items() if count)
    return ", ".join(f"{printable(name) or 'no suffix'} {-count:,}" for count, name in ranked)


def list_others(suffixes: Mapping[str, int]) -> str:
    """Files that were not taken for pictures, by suffix, and what would read the pictures of phones among them."""
    heic = any(suffix in (".heic", ".heif") for suffix in suffixes)
    hint = f"; HEIC is read with the extra `heic`: {install('heic')}" if heic else ""
    return list_counts(suffixes) + hint


def is_first_rank() -> bool:
    """Whether this process speaks for its job (`torchrun` and `srun` start several)."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def print_on_first_rank(line: str) -> None:
    """One line of a job, said once."""
    if is_first_rank():
        print(printable(line), flush=True)


class ProgressBar:
    """How far a command is, on stderr: a bar on a terminal, else a line now and then.

    It appears with the first update, so that an error before it stays one line.
    """

    def __init__(self, what: str = "") -> None:
        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn()
        status = TextColumn("{task.fields[status]}", markup=False)
        self._bar = Progress(*columns, status, console=self._console)
        self._task = self._bar.add_task(what, total=None, status="")
        self._what, self._said_at, self._said = what, -LINE_SECONDS, ""

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(self, done: int, total: int, status: str = "", what: str | None = None) -> None:
        """Say how many are done, of how many, and what else there is to say."""
        if not is_first_rank():
            return
        what = self._what if what is None else printable(what)
        if self._console.is_terminal:
            room = self._console.width - len(f"{what} {done}/{total} ")
            self._bar.columns[2].bar_width = min(40, max(4, room - len(status) - 1))  # type: ignore[attr-defined]
            status = status[: max(0, room - 6)]  # the numbers in front are what must be seen
            self._bar.start()
            self._bar.update(self._task, description=what, total=total, completed=done, status=status)
        elif time.monotonic() - self._said_at >= LINE_SECONDS or (done == total and self._said != f"{what} {total}"):
            self._said_at, self._said = time.monotonic(), f"{what} {done}"
            print(f"{what}: {done:,} of {total:,}{f'  {status}' if status else ''}", file=sys.stderr, flush=True)


def format_time(seconds: float) -> str:
    """Minutes and seconds left, or hours if there are many."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
