"""A hostile case: what is laid into an empty folder, which command meets it there, and what is right."""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class World:
    """Sound things that cases copy, spoil, or are held against; nothing may change them."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    folder: Path
    """Where it ran."""
    peak: int
    """Bytes of memory, at most, of its largest process."""
    seconds: float

    def report(self) -> dict[str, Any]:
        """What it printed as JSON."""
        return json.loads(self.out)


Check = Callable[[Outcome], str | None]
"""What is wrong with an outcome, or None."""


@dataclass(frozen=True)
class Case:
    """One command on bad input."""

    kind: str
    name: str
    make: Callable[[Path], list[str]]
    """Fills an empty folder and returns the arguments of `diptych`, which is started in it."""
    codes: frozenset[int] = frozenset({0, 1, 2})
    """Exit codes that are right."""
    check: Check | None = None
    inputs: int = 1
    """How many bad things the command meets."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Set, or taken away where None; then the command gets an interpreter of its own."""
    own: bool = False
    """Whether it needs an interpreter of its own in any case."""
    prepare: Callable[[], None] | None = None
    """Called in the process itself, just before: limits, another user."""
    seconds: float = 60.0
    peak: int = 1200 * MIB
    may_lack_memory: bool = False
    """Whether a shortage of memory is what the case is about."""


# --- what is right ---------------------------------------------------------------------------------------------------


def refused(*words: str) -> Check:
    """One line of ours that says these words."""

    def check(outcome: Outcome) -> str | None:
        lines = [line for line in outcome.err.splitlines() if line.startswith("diptych: ")]
        if outcome.code != 2 or len(lines) != 1:
            return f"exit code {outcome.code}, {len(lines)} lines of ours"
        lost = [word for word in words if not re.search(word, lines[0])]
        return f"the line does not say {lost}: {lines[0][:300]}" if lost else None

    return check


def accounted(inputs: int, **skipped: int) -> Check:
    """`embed --json`: features and skipped make up the inputs; these reasons, if any are named, and no others."""

    def check(outcome: Outcome) -> str | None:
        report = outcome.report()
        total = sum(report["skipped"].values())
        if (report["inputs"], report["features"] + total) != (inputs, inputs):
            return f"{inputs} inputs became {report}"
        if "out_of_memory" in report["skipped"]:
            return f"memory: {report}"
        if outcome.code != (1 if total else 0):
            return f"exit code {outcome.code} with {total} skipped"
        return f"skipped {report['skipped']}, not {skipped}" if skipped and report["skipped"] != skipped else None

    return check


def went_on(outcome: Outcome) -> str | None:
    """It did its work in spite of all."""
    return None if outcome.code in (0, 1) else f"exit code {outcome.code}: {outcome.err[-300:]}"


def refused_or_right(outcome: Outcome) -> str | None:
    """Either the work is done, or one line says why not."""
    return None if outcome.code in (0, 1) else refused()(outcome)


# --- damage ----------------------------------------------------------------------------------------------------------


def damage_bytes(data: bytes, draws: random.Random) -> bytes:
    """Cut, flip bits, take a stretch out, or repeat one."""
    spoilt = bytearray(data)
    where = draws.randrange(len(data))
    match draws.randrange(5):
        case 0:
            del spoilt[where:]
        case 1:
            for _ in range(draws.randrange(1, 8)):
                spoilt[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        case 2:
            del spoilt[where : where + draws.randrange(1, 64)]
        case 3:
            spoilt[where:where] = spoilt[: draws.randrange(64)]
        case 4:
            spoilt[where : where + 4] = draws.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(spoilt)


DEEP = b"[" * 100_000
STRANGE_VALUES: dict[str, Any] = {
    "null": None,
    "a list": [],
    "an object": {},
    "a text": "x\x1b[2J",
    "a number": 5,
    "negative": -1,
    "huge": 1 << 80,
    "a float": 0.5,
    "true": True,
    "a path out": "../../../etc/passwd",
}


def damage_json(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A JSON file spoilt as a whole."""
    yield "empty", b""
    yield "blanks", b" " * 5000
    for name, value in STRANGE_VALUES.items():
        yield name, json.dumps(value).encode()
    yield "deep", DEEP
    yield "deep objects", b'{"a":' * 100_000
    yield "a number of 5,000 digits", b"9" * 5000
    yield "infinite", b"1e999"
    yield "NaN", b"NaN"
    yield "not UTF-8", b'{"a": "\xff"}'
    yield "UTF-16", data.decode().encode("utf-16")
    yield "with a mark of UTF-8", b"\xef\xbb\xbf" + data
    yield "cut", data[: len(data) // 2]
    yield "twice", data + data
    yield "zeros", bytes(len(data))
    yield "a lone surrogate", b'"\\ud800"'
    yield "key twice", b'{"a": 1, "a": 2}'


def damage_values(data: bytes, draws: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """A JSON file with one value that is another, or one key that is not there."""
    for number in range(count):
        record = json.loads(data)
        holders = list(_iter_holders(record))
        if not holders:
            return
        holder, key = draws.choice(holders)
        what = draws.choice(["taken out", "of 5,000 digits", *STRANGE_VALUES])
        text = None
        if what == "taken out":
            del holder[key]
        elif what == "of 5,000 digits":
            holder[key] = "@@"
            text = json.dumps(record).replace('"@@"', "9" * 5000)
        else:
            holder[key] = STRANGE_VALUES[what]
        yield f"{number} {key} {what}", (text or json.dumps(record)).encode()


def _iter_holders(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield value, key
            yield from _iter_holders(inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield value, number
            yield from _iter_holders(inner)
