"""Words of the report: counts, lists that end, sentences about what is left out, the command that makes a result."""

from collections.abc import Sequence

from diptych.evaluate.datasets.registry import known_datasets
from diptych.evaluate.references import PAPER27

MADE = ("digits", "rendered_text", "counting")
"""The suite that is made here (`recipes.datasets`)."""


def count(number: int, noun: str) -> str:
    """So many of something, in words that agree."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def mean(values: Sequence[float]) -> float:
    """The average; an empty one is a bug of the caller."""
    return sum(values) / len(values)


def sentence(*parts: str) -> str:
    """Sentences that are not empty, as one text."""
    return " ".join(part for part in parts if part)


def list_few(names: Sequence[str], few: int = 8) -> str:
    """Names as a text; of many the first, and how many more."""
    shown = ", ".join(names[:few])
    return shown if len(names) <= few else f"{shown} and {len(names) - few} more"


def left_out(names: Sequence[str], why: str) -> str:
    """A sentence about what is not shown; nothing if all is."""
    return f"Left out: {list_few(names)} ({why})." if names else ""


def evaluate_command(datasets: Sequence[str], *protocols: str, several: bool = False) -> str:
    """Command that makes these results: the suite for the paper's datasets, the names of others.

    Where sets of one's own lie, as a folder, table or TOML, no result says.
    """
    if not datasets or set(datasets) <= set(PAPER27):
        suite = "paper27"
    elif set(datasets) <= set(MADE):
        suite = "made"
    else:
        known = known_datasets()
        suite = " ".join(name if name in known else f"path/to/{name}" for name in datasets)
    models = "--model A --model B ..." if several else "--model MODEL"
    chosen = f" --protocols {' '.join(protocols)}" if protocols else ""
    return f"diptych evaluate {models} --suite {suite}{chosen}"
