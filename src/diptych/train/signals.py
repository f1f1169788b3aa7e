"""Signals that end a run."""

import signal
import threading
from typing import Any


class Signals:
    """SIGTERM and Ctrl-C end a run behind its step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal that came, if one did."""
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
