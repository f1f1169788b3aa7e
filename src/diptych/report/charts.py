"""Figures as numbers: computed apart from drawing, so that tests and readers can look at it.

    Chart -> panels: Plot (series of marks, lines) or Bars -> draw.py

Nothing here imports torch or matplotlib.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["number", "percent", "logit", "log", "shots", "points", "share", "error"]
"""number: as it is. percent: 0..1 shown in percent. logit: the same, with logits as distances. log: a positive number.
shots: examples a class, 0 at the left. points: a difference of percentages. share: of pictures, 0..1. error: 1 - value,
both on a log."""
Whose = Literal["ours", "baseline", "confirmed", "unconfirmed"]
"""Ours: a CLIP that was measured here. baseline: another model that was measured here. The rest is published."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a plot."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    """Ends of the interval of y."""
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Marks that belong together."""

    name: str
    marks: tuple[Mark, ...]
    whose: Whose = "ours"
    joined: bool = False
    """Whether a line goes from mark to mark."""
    labelled: bool = True
    """Whether each mark carries its label."""
    family: str = ""
    """Series of one family have one colour."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A line to look along: the identity, a fit, a mean."""

    name: str
    points: tuple[tuple[float, float], ...] = ()
    """Where it goes, from left to right."""
    at: float | None = None
    """Value at which a mark of a Bars stands, instead of points."""
    whose: Whose = "ours"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Marks over two axes."""

    title: str
    x_label: str
    y_label: str
    x_axis: Axis
    y_axis: Axis
    series: tuple[Series, ...]
    guides: tuple[Guide, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar, and what is published of the same."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    published: float | None = None
    confirmed: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from top to bottom."""

    title: str
    x_label: str
    axis: Axis
    bars: tuple[Bar, ...]
    guides: tuple[Guide, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the paper, made of results."""

    number: str
    """As in the paper."""
    name: str
    """For file names."""
    title: str
    caption: str
    """Sentences about what it shows and what is missing."""
    panels: tuple[Plot | Bars, ...]
    command: str
    """Command that computed the results."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure that cannot be drawn."""

    number: str
    title: str
    why: str
    command: str
    """Command that would supply the results."""
