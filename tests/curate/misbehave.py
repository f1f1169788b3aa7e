"""What pages do to a parser, for its tests."""

import os
import signal
from dataclasses import dataclass

from diptych.curate.pages.page import Page

KEPT: list[bytearray] = []


@dataclass(frozen=True)
class Misbehave:
    """What a page asks for happens, in the parser's process."""

    def __call__(self, page: Page) -> list | str:
        if page.body == b"hang":
            while True:
                pass
        if page.body == b"kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if page.body == b"stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if page.body == b"keep":
            KEPT.append(bytearray(150 << 20))
        if page.body == b"eat":
            return [(str(len(bytes(8 << 30))),)]
        if page.body == b"eat slowly":
            eaten = []
            while True:
                eaten.append(bytearray(1 << 20))
        if page.body == b"raise":
            raise RecursionError
        if page.body == b"odd":
            return [("\ud800",)]
        if page.body == b"print":
            print("noise on the standard output", flush=True)
        return [(page.body.decode(),)]
