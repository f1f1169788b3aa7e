"""Gains and losses of fine-tuning: every evaluation of the model as it is beside that of the model it started from."""

from collections.abc import Mapping
from dataclasses import dataclass

COUNTS = ("images", "skipped")
"""Numbers of an evaluation that say how much was asked, not how well it was answered."""

HEADLINES = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")
"""The one number, or two, that an evaluation is known by."""


@dataclass(frozen=True)
class Change:
    """One number of one evaluation."""

    name: str
    start: float
    now: float

    @property
    def points(self) -> float:
        """Won, or lost if below 0, in points of a hundred."""
        return 100 * (self.now - self.start)


def changes(start: Mapping[str, float], now: Mapping[str, float]) -> list[Change]:
    """Every share that both have, in the order of `now`."""
    shares = [name for name in now if name in start and name.rpartition("/")[2] not in COUNTS]
    return [Change(name, start[name], now[name]) for name in shares]


def lost(start: Mapping[str, float], now: Mapping[str, float], limit: float | None) -> list[Change]:
    """The shares that fell by more than `limit` points; none without a limit."""
    return [] if limit is None else [change for change in changes(start, now) if -change.points > limit]
