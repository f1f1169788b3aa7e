"""The paper's linear probe (Appendix A.3): logistic regression on features, its penalty found on validation pictures.

The grid has 97 strengths, 10^-6 to 10^6 in steps of an eighth of a decade. Every second decade is tried first; then
the interval around the best one is halved four times, trying left and right of it: at most 15 fits. The best strength
is fitted again on training and validation pictures together, and that is what answers for the test pictures.

Where scikit-learn stops after `max_iter` = 1000 steps or when the slope is small, each of our fits goes to the optimum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.probe.config import ProbeConfig
from diptych.evaluate.probe.logistic import Fit, Problem
from diptych.shards.order import derive_seed, permutation

COARSE = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)
"""Decades that are tried first, from strong to weak: each optimum is a good start for the next."""
HALVINGS = (1.0, 0.5, 0.25, 0.125)
"""Distances, in decades, of what is then tried beside the best."""

_NOTHING = 1e3
"""A penalty that is so many times stronger than the loss of a picture can bend leaves weights of nothing."""

Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Outcome of a linear probe."""

    l2: float
    """The strength that was best on the validation pictures; the stronger one of equals."""
    validation: tuple[tuple[float, float], ...]
    """(strength, value on the validation pictures) of all that were tried, in order; empty if it was given."""
    value: float
    """The metric on the test pictures."""
    predictions: Float[Tensor, "M C"]
    """Scores of the test pictures."""
    converged: bool
    """Whether every fit reached its optimum."""
    train_images: int
    """Pictures of the last fit: training and validation."""
    weight: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    seconds: float


def linear_probe(
    train: Tensor | ArrayLike,
    train_labels: Tensor | ArrayLike,
    test: Tensor | ArrayLike,
    test_labels: Tensor | ArrayLike,
    *,
    classes: int,
    val: tuple[Tensor | ArrayLike, Tensor | ArrayLike] | None = None,
    metric: Metric = accuracy,
    seed: int = 0,
    config: ProbeConfig = ProbeConfig(),  # noqa: B008 - frozen
) -> ProbeReport:
    """Fit on training pictures, choose the penalty on validation pictures (held out of the former by `seed` if there
    are none), measure on test pictures.

    Features are [pictures, columns], labels the number of each picture's class, or [pictures, classes] 0/1 where a
    picture may show several things: tensors, or whatever NumPy makes arrays of. `metric` is given scores and labels as
    tensors. All of one device.

    Raises UsageError for features that are not numbers, or too large or small for any strength of the grid; for labels
    that do not fit them or the metric, fewer than two classes, and classes without a training picture.
    """
    started = time.perf_counter()
    train, train_labels = as_examples(train, train_labels, classes, "training", metric)
    test, test_labels = as_examples(test, test_labels, classes, "test", metric, like=(train, train_labels))
    if val is not None:
        val_features, val_labels = as_examples(*val, classes, "validation", metric, like=(train, train_labels))
        held_out = torch.arange(len(train) + len(val_features)) >= len(train)
        train, train_labels = torch.cat([train, val_features]), torch.cat([train_labels, val_labels])
    elif config.l2 is None:
        held_out = hold_out(train_labels, config.val_share, seed)
    else:
        held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out = held_out.to(train.device)
    path: list[Fit] = []
    validation: list[tuple[float, float]] = []
    check_taught(train_labels[~held_out], classes)
    if config.l2 is None:
        problem = Problem(train[~held_out][None], train_labels[~held_out][None], classes)
        if (problem.penalty(10 ** COARSE[-1]) > _NOTHING * problem.pictures).any():
            raise UsageError(
                f"the training features spread by {float(problem.unit.max()):.1g} only, so that even the weakest "
                "strength of the grid leaves nothing to learn; scale them, say by their standard deviation"
            )

        def try_strength(l2: float) -> float:
            path.append(problem.fit(l2, path))
            return metric(path[-1].scores(train[held_out][None])[0], train_labels[held_out])

        validation = search(try_strength)
    l2 = config.l2 or best_of(validation)
    last = Problem(train[None], train_labels[None], classes).fit(l2, [fit for fit in path if fit.l2 == l2])
    predictions = last.scores(test[None])[0]
    return ProbeReport(
        l2=l2,
        validation=tuple(validation),
        value=metric(predictions, test_labels),
        predictions=predictions,
        converged=all(fit.converged for fit in [*path, last]),
        train_images=len(train),
        weight=last.weight[0].T,
        bias=last.bias[0],
        seconds=time.perf_counter() - started,
    )


def search(try_strength: Callable[[float], float]) -> list[tuple[float, float]]:
    """The paper's search: what was tried, in order. It takes the values to have one peak (they need not)."""
    tried = [(10**decade, try_strength(10**decade)) for decade in COARSE]
    decades = {10**decade: decade for decade in COARSE}
    for distance in HALVINGS:
        peak = decades[best_of(tried)]
        for decade in (peak + distance, peak - distance):
            if abs(decade) <= COARSE[0]:
                decades[10**decade] = decade
                tried.append((10**decade, try_strength(10**decade)))
    return tried


def best_of(tried: list[tuple[float, float]]) -> float:
    """The strength with the highest value; of equals the strongest, which is the simplest classifier."""
    return max(tried, key=lambda pair: (pair[1], pair[0]))[0]


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which pictures are for validation: that share of each class, at least one where there are two.

    With several things in a picture there are no classes to draw from; pictures are drawn from all.
    """
    order = torch.from_numpy(permutation(len(labels), derive_seed("held out", seed)))
    groups = labels.cpu() if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for group in groups.unique():
        rows = order[groups[order] == group]
        if len(rows) > 1:
            held_out[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not held_out.any():
        raise UsageError(
            f"none of the {len(groups.unique())} classes has two training pictures, so none can be held out to choose "
            "the penalty; give validation pictures or a fixed l2"
        )
    return held_out


Examples = tuple[Tensor, Tensor]


def as_examples(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    classes: int,
    what: str,
    metric: Metric,
    *,
    like: Examples | None = None,
) -> Examples:
    """Features as float32, or float64 if they are, and their labels as int64, or 0/1 in a matrix; UsageError for what
    is none, does not fit each other, or does not fit the examples that it is to be like."""
    if classes < 2:
        raise UsageError(f"{classes} classes cannot be told apart; a probe needs two or more: check the labels")
    found = _as_features(features, what)
    numbers = _as_labels(labels, classes, what).to(found.device)
    if len(numbers) != len(found):
        raise UsageError(
            f"{len(numbers)} {what} labels for {len(found)} rows of features; each row needs one: take both from the "
            "same pictures in the same order"
        )
    if numbers.ndim == 2 and metric is accuracy:
        raise UsageError(
            f"{what} labels of several things in a picture have no accuracy; give another metric, such as "
            "mean_average_precision of diptych.evaluate.metrics.measures"
        )
    if like is not None and like[0].shape[1] != found.shape[1]:
        raise UsageError(
            f"training features have {like[0].shape[1]} columns, {what} features {found.shape[1]}; they must be of one "
            "model: embed both with it"
        )
    if like is not None and like[1].ndim != numbers.ndim:
        raise UsageError(f"training and {what} labels must both be class numbers, or both 0 or 1 for each class")
    return found, numbers


def _as_tensor(values: Tensor | ArrayLike, what: str) -> Tensor:
    """A tensor of numbers; UsageError for what is none."""
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        if array.dtype == object:  # a column of rows
            array = np.array(array.tolist())
        if array.dtype.kind not in "biuf":
            raise TypeError(f"they are {array.dtype}")
        native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
        return torch.from_numpy(np.array(array, dtype=native))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{what} are no table of numbers ({str(error).splitlines()[0][:100]})") from None


def _as_features(features: Tensor | ArrayLike, what: str) -> Tensor:
    """float32, or float64 if they are."""
    found = _as_tensor(features, f"{what} features")
    if found.ndim != 2 or not found.numel():
        raise UsageError(f"no {what} features (shape {tuple(found.shape)}); give a row for each picture")
    broken = (~found.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(broken):
        raise UsageError(
            f"row {int(broken[0])} of the {what} features is not finite ({len(broken)} of {len(found)} in all); "
            "a probe needs numbers: embed those pictures again or leave them out"
        )
    return found if found.dtype == torch.float64 else found.float()


def _as_labels(labels: Tensor | ArrayLike, classes: int, what: str) -> Tensor:
    """Class numbers as int64, or a matrix of 0 and 1."""
    found = _as_tensor(labels, f"{what} labels")
    if found.ndim == 2:
        if found.shape[1] != classes or not ((found == 0) | (found == 1)).all():
            raise UsageError(
                f"{what} labels of shape {tuple(found.shape)} for {classes} classes; several labels a picture are "
                "given as 0 or 1 for each class: one column a class"
            )
        return found.float()
    if found.ndim != 1:
        raise UsageError(f"{what} labels have the shape {tuple(found.shape)}; give the number of each picture's class")
    numbers = found.to(torch.int64)
    if found.is_floating_point() and len(odd := (numbers != found).nonzero()[:, 0]):
        raise UsageError(f"row {int(odd[0])} of the {what} labels is {found[odd[0]]:g}, which is no class's number")
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= classes):
        raise UsageError(
            f"{what} labels go from {int(numbers.min())} to {int(numbers.max())}; {classes} classes are 0 to "
            f"{classes - 1}: check the labels or the number of classes"
        )
    return numbers


def check_taught(labels: Tensor, classes: int) -> None:
    """UsageError if a class cannot be learnt from these labels."""
    if labels.ndim == 1:
        counts = torch.bincount(labels, minlength=classes)
        missing, why = (counts == 0).nonzero()[:, 0].tolist(), "no training picture"
    else:
        counts = (labels > 0.5).sum(dim=0)
        missing = ((counts == 0) | (counts == len(labels))).nonzero()[:, 0].tolist()
        why = "no training picture that shows it, or none that does not"
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UsageError(
            f"{len(missing)} of {classes} classes have {why} (class {some}); a probe needs both for each class: "
            "check the labels, add pictures, or leave those classes out"
        )
