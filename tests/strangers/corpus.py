"""All kinds together, and the few of each that tests run."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from checkpoint.hostile import CASES
from strangers import machine, names, nonfiles, pictures, records, remote, tables, tars
from strangers.case import MIB, Case, World, refused

KINDS = (pictures, nonfiles, tars, tables, names, records, machine, remote)


def iter_cases(world: World, share: float = 1.0) -> Iterator[Case]:
    """A part of the cases of every kind, at least one, always the same."""
    draws = random.Random(0)
    for kind in (*KINDS, None):
        cases = list(kind.iter_cases(world) if kind else _iter_checkpoints())
        yield from draws.sample(cases, max(1, round(share * len(cases)))) if share < 1 else cases


def _iter_checkpoints() -> Iterator[Case]:
    for name, build in CASES.items():
        yield Case("checkpoints", name, partial(_load, build), check=refused(), peak=1024 * MIB)


def _load(build: object, folder: Path) -> list[str]:
    (folder / "files").mkdir()
    place = build(folder / "files", folder / "canary")  # type: ignore[operator]
    return ["verify", str(place.relative_to(folder)), "--activation", "quick_gelu"]
