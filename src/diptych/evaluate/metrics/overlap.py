"""Did it help that a model had seen evaluation pictures in training? (paper section 5, Appendix C)

Curation finds which pictures of an evaluation set have a near-duplicate in the training set (`diptych curate
contamination`, `overlap.parquet`); this divides the set by that, and says whether the difference may be chance.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from diptych.errors import UsageError

CONFIDENCE = 0.995
"""Confidence of the interval around the accuracy on the overlap, as in the paper's Figure 17."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """An evaluation set, divided into pictures that were seen in training and clean ones."""

    images: int
    overlapping: int
    share: float
    """Share of the pictures that were seen in training."""
    acc_all: float
    acc_clean: float
    """NaN if all pictures were seen."""
    acc_overlap: float
    """NaN if none was."""
    interval: tuple[float, float]
    """Clopper-Pearson interval of `acc_overlap`, at `CONFIDENCE`."""
    gained: float
    """acc_all - acc_clean: what the overlap adds to the accuracy that is reported."""
    p_value: float
    """Chance of as many hits on the overlap, or more, if it were as hard as the clean rest (one-tailed binomial)."""


def measure_overlap(correct: Mapping[str, bool], overlapping: Collection[str]) -> Overlap:
    """Divide an evaluation: `correct` says of each picture's key whether it was named rightly.

    Raises UsageError for no pictures, or for keys of the overlap that are in no answer: another set was asked.
    """
    if not correct:
        raise UsageError("no answers to divide; evaluate the set first")
    seen = set(overlapping)
    if unknown := sorted(seen - correct.keys()):
        raise UsageError(
            f"{len(unknown)} keys of the overlap are not among the {len(correct)} answers ({unknown[0]}, ...); "
            "take the overlap of the set that was evaluated"
        )
    hits = sum(correct[key] for key in seen)
    clean, clean_hits = len(correct) - len(seen), sum(correct.values()) - hits
    acc_all = (hits + clean_hits) / len(correct)
    acc_clean = clean_hits / clean if clean else math.nan
    return Overlap(
        images=len(correct),
        overlapping=len(seen),
        share=len(seen) / len(correct),
        acc_all=acc_all,
        acc_clean=acc_clean,
        acc_overlap=hits / len(seen) if seen else math.nan,
        interval=clopper_pearson(hits, len(seen)),
        gained=acc_all - acc_clean,
        p_value=at_least(hits, len(seen), acc_clean) if clean and seen else 1.0,
    )


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """The p-values of several sets, each as if it had been the only one that was looked at."""
    return [min(1.0, p * len(p_values)) for p in p_values]


def clopper_pearson(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a share: all shares that make `hits` of `trials` not too unlikely, on either side."""
    tail = (1 - confidence) / 2
    low = _solve(lambda p: at_least(hits, trials, p) - tail) if hits else 0.0
    high = _solve(lambda p: tail - (1 - at_least(hits + 1, trials, p))) if hits < trials else 1.0
    return low, high


def at_least(hits: int, trials: int, p: float) -> float:
    """P(X >= hits) for a binomial X of `trials` with chance `p`, exact up to the rounding of float64."""
    if hits <= 0 or p >= 1:
        return 1.0
    if hits > trials or p <= 0:
        return 0.0
    k = torch.arange(trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weights = (ways + k * math.log(p) + (n - k) * math.log1p(-p)).exp()
    upper, lower = weights[hits:].sum().item(), weights[:hits].sum().item()
    return upper if upper < lower else 1 - lower  # the smaller sum is the more exact one


def _solve(increasing: Callable[[float], float]) -> float:
    """The root of an increasing function on [0, 1], by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2
