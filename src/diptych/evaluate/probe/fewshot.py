"""Few-shot classification (Figure 6): logistic regression on a few pictures of each class, many draws at once.

The paper says neither how pictures were drawn nor how strong the penalty was. Here a seed puts the pictures of each
class into an order, and k shots are the first k: the draws of a seed are nested, so a curve over shots is not made of
different luck. The order depends on the seed and the picture's place alone. All seeds of a number of shots are solved
as one batch.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.probe.config import FewShotConfig
from diptych.evaluate.probe.logistic import Problem
from diptych.evaluate.probe.search import Metric, as_examples, check_taught
from diptych.shards.order import derive_seed, permutation

SHOTS = (1, 2, 4, 8, 16)
"""The paper's."""

_RELATIVE = 1e-3
"""Strength of the penalty by mean squared distance: of 10^-5 to 10^3 none is better everywhere (docs/probe.md)."""

_TOGETHER = 2**26
"""Numbers of features and scores in one batch of problems."""


@dataclass(frozen=True, kw_only=True)
class FewShotReport:
    """Values of probes that were trained on a few images a class."""

    values: Mapping[int, tuple[float, ...]]
    """Shots -> the metric on the test pictures, for each seed."""
    train_images: Mapping[int, int]
    """Shots -> pictures in a draw (the most of all seeds, where a picture may show several things)."""
    skipped: Mapping[int, int]
    """Shots that were left out -> classes that have fewer pictures."""
    l2: float
    converged: bool
    weights: Mapping[int, Float[Tensor, "S C D"]]
    """Shots -> float32 weights for each seed, and below their biases; empty unless they were asked for."""
    biases: Mapping[int, Float[Tensor, "S C"]]
    seconds: float

    def means(self) -> dict[int, float]:
        """Shots -> mean over seeds."""
        return {shots: sum(values) / len(values) for shots, values in self.values.items()}


def few_shot(
    train: Tensor | ArrayLike,
    train_labels: Tensor | ArrayLike,
    test: Tensor | ArrayLike,
    test_labels: Tensor | ArrayLike,
    *,
    classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: int = 10,
    metric: Metric = accuracy,
    keep: bool = False,
    config: FewShotConfig = FewShotConfig(),  # noqa: B008 - frozen
) -> FewShotReport:
    """Train on `shots` pictures of each class, drawn `seeds` times, and measure on the test pictures; `keep` also
    returns what was learnt.

    Features and labels as in `linear_probe`. Where a picture may show several things, shots are pictures that show a
    class; one that is drawn for two classes counts once. Raises UsageError as `linear_probe` does, and if no number of
    shots is left that every class has pictures for.
    """
    started = time.perf_counter()
    train, train_labels = as_examples(train, train_labels, classes, "training", metric)
    test, test_labels = as_examples(test, test_labels, classes, "test", metric, like=(train, train_labels))
    check_taught(train_labels, classes)
    if seeds < 1 or not shots or min(shots) < 1:
        raise UsageError(
            f"shots {list(shots)} with {seeds} seeds; both are 1 or more: give shots such as 1, 2, 4, 8, 16"
        )
    shows = torch.nn.functional.one_hot(train_labels, classes) if train_labels.ndim == 1 else train_labels > 0.5
    counts = shows.sum(dim=0)
    skipped = {k: int((counts < k).sum()) for k in sorted(set(shots)) if (counts < k).any()}
    if len(skipped) == len(set(shots)):
        raise UsageError(
            f"class {int(counts.argmin())} has {int(counts.min())} training pictures, fewer than any of shots "
            f"{sorted(set(shots))}; each class needs as many: ask for fewer shots or leave such classes out"
        )
    l2 = config.l2 or _RELATIVE * mean_square(train)
    values: dict[int, tuple[float, ...]] = {}
    images: dict[int, int] = {}
    weights: dict[int, Tensor] = {}
    biases: dict[int, Tensor] = {}
    converged = True
    for k in sorted(set(shots) - skipped.keys()):
        rows = [draw(shows, k, seed) for seed in range(seeds)]
        if train_labels.ndim == 2:
            for drawn in rows:  # a class may be shown by all that were drawn
                check_taught(train_labels[drawn], classes)
        found: list[float] = []
        learnt: list[tuple[Tensor, Tensor]] = []
        for batch in batches(rows, train.shape[1], classes):
            fit = Problem(train[batch], train_labels[batch], classes).fit(l2)
            found += [metric(one.scores(test[None])[0], test_labels) for one in fit.problems()]
            converged &= fit.converged
            if keep:
                learnt.append((fit.weight.mT.float(), fit.bias.float()))
        values[k], images[k] = tuple(found), max(map(len, rows))
        if keep:
            weights[k], biases[k] = (torch.cat(parts) for parts in zip(*learnt, strict=True))
    return FewShotReport(
        values=values,
        train_images=images,
        skipped=skipped,
        l2=l2,
        converged=converged,
        weights=weights,
        biases=biases,
        seconds=time.perf_counter() - started,
    )


def draw(shows: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of the first pictures of each class in the order of a seed, sorted; `shows` is [pictures, classes]."""
    order = torch.from_numpy(permutation(len(shows), derive_seed("shots", seed))).to(shows.device)
    ordered = shows[order] > 0
    first = ordered & (ordered.cumsum(dim=0) <= shots)
    return order[first.any(dim=1)].sort().values


def batches(rows: Sequence[Tensor], columns: int, classes: int) -> Iterator[Tensor]:
    """Draws of one size together, as many as memory allows, in order."""
    first = 0
    while first < len(rows):
        size = len(rows[first])
        most = max(1, _TOGETHER // (size * (columns + classes)))
        last = first + 1
        while last < min(len(rows), first + most) and len(rows[last]) == size:
            last += 1
        yield torch.stack(list(rows[first:last]))
        first = last


def mean_square(features: Tensor) -> float:
    """Mean squared distance from the mean; 1 if all are the same."""
    return float(features.double().var(dim=0, correction=0).sum()) or 1.0


def data_efficiency(
    zero_shot: float, few_shot: Mapping[int, float], full: tuple[float, float] | None = None
) -> float | None:
    """How many labelled pictures a class a classifier needs to be as good as zero-shot (Figure 7).

    Values are interpolated on a straight line over the logarithm of the pictures a class; `full` is (pictures a class,
    value) of the classifier that was trained on all. The first crossing counts. Below one shot the line through the two
    smallest numbers is followed down; None if all pictures do not reach the value.
    """
    curve = sorted((float(pictures), value) for pictures, value in [*few_shot.items(), *([full] if full else [])])
    if len(curve) < 2 or curve[0][0] <= 0:
        raise UsageError(
            f"{len(curve)} points of a curve over pictures a class cannot be interpolated; give values of two or more "
            "numbers of shots, or of one and of all pictures"
        )
    if zero_shot <= curve[0][1]:
        rising = curve[1][1] > curve[0][1]
        return _cross(*curve[0], *curve[1], zero_shot) if rising else curve[0][0]
    for (a, low), (b, high) in pairwise(curve):
        if low < zero_shot <= high:
            return _cross(a, low, b, high, zero_shot)
    return None


def _cross(a: float, low: float, b: float, high: float, value: float) -> float:
    return math.exp(math.log(a) + (value - low) / (high - low) * math.log(b / a))
