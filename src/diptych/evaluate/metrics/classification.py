"""Zero-shot transfer as a protocol: scores of a set to the number that counts, and all that belongs to it.

Everything here works on features and labels: pictures were embedded before, once. Scores are logits, exp(t) times the
cosine of picture and class, so that their softmax is what the model believes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import DatasetError
from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.assignment import confusion, find_permutation
from diptych.evaluate.metrics.measures import METRICS, bootstrap_interval, wilson_interval

CONFUSION = 50
"""Classes up to which the whole table is kept."""
BINS = 15
"""Bins of the expected calibration error."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Fields of a Result that depend on scores."""

    metric: str
    value: float
    ci95: tuple[float, float]
    chance: float | None
    metrics: Mapping[str, float]
    per_class: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    details: Mapping[str, Any] = field(default_factory=dict)


def score_single(
    scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], names: Sequence[str], metric: str, *, seed: int = 0
) -> Scored:
    """One label a picture: accuracies, recall of each class, calibration, and whether something looks wrong."""
    classes = len(names)
    predicted = best_class(scores)
    table = confusion(predicted, labels, classes)
    images = table.sum(dim=1)
    found: dict[str, float] = {
        "acc1": measures.accuracy(scores, labels),
        **({"acc5": measures.accuracy(scores, labels, top=5)} if classes >= 5 else {}),
        "mean_per_class_recall": measures.mean_per_class_recall(scores, labels),
    }
    if metric not in found:
        found[metric] = METRICS[metric](scores, labels)
    value, guess = found[metric], measures.chance(metric, classes)
    interval = _interval(metric, scores, labels, seed)
    per_class = [
        {
            "name": names[i],
            "images": int(images[i]),
            "recall": table[i, i].item() / n if (n := int(images[i])) else None,
        }
        for i in range(classes)
    ]
    warnings = [*_absent(names, images), *_near_chance(metric, value, interval, guess)]
    if (permutation := find_permutation(predicted, labels, classes)) is not None:
        moved = permutation.moved
        pairs = ", ".join(f"{names[i]} -> {names[permutation.columns[i]]}" for i in moved[:3])
        more = ", ..." * (len(moved) > 3)
        warnings.append(
            f"labels look permuted: with {len(moved)} classes in another order, accuracy on pictures that did not "
            f"choose it is {permutation.after:.1%} instead of {permutation.before:.1%} ({pairs}{more})"
        )
    details = calibration(scores, labels)
    if classes <= CONFUSION:
        details["confusion"] = table.tolist()
    return Scored(
        metric=metric,
        value=value,
        ci95=interval,
        chance=guess,
        metrics=found,
        per_class=per_class,
        warnings=warnings,
        details=details,
    )


def score_multi(
    scores: Float[Tensor, "N C"],
    targets: Float[Tensor, "N C"],
    names: Sequence[str],
    metric: str,
    *,
    seed: int = 0,
    softmax: bool = True,
) -> Scored:
    """Several labels a picture. The 11-point metric ranks zero-shot scores by their softmax over the classes, a probe's
    and CLIP_benchmark's as they are."""
    ranked = scores.double().softmax(dim=1) if softmax and metric == "map_11_point" else scores
    found = {metric: METRICS[metric](ranked, targets)}
    single = measures.average_precision_11 if metric == "map_11_point" else measures.average_precision
    counts = targets.sum(dim=0)
    per_class = [
        {"name": name, "images": int(counts[c]), "average_precision": single(ranked[:, c], targets[:, c])}
        for c, name in enumerate(names)
    ]
    interval = bootstrap_interval(
        lambda rows: METRICS[metric](ranked[rows], targets[rows]), len(scores), draws=200, seed=seed
    )
    guess = measures.chance(metric, len(names), targets)
    warnings = [*_absent(names, counts), *_near_chance(metric, found[metric], interval, guess)]
    return Scored(
        metric=metric,
        value=found[metric],
        ci95=interval,
        chance=guess,
        metrics=found,
        per_class=per_class,
        warnings=warnings,
    )


def best_class(scores: Float[Tensor, "N C"]) -> Int[Tensor, " N"]:
    """The class with the highest score; of equal ones the first."""
    index = torch.arange(scores.shape[1], device=scores.device)
    return index.where(scores == scores.amax(dim=1, keepdim=True), scores.shape[1]).amin(dim=1)


def check_scores(scores: Float[Tensor, "N C"], what: str) -> None:
    """Raise DatasetError for scores that are not finite: they would be counted as wrong, or as right."""
    if broken := int((~scores.isfinite().all(dim=1)).sum()):
        raise DatasetError(f"{what}: {broken} of {len(scores)} pictures have scores that are NaN or infinite")


def calibration(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> dict[str, Any]:
    """How far beliefs are from shares that are right: expected calibration error, negative log-likelihood, and the
    temperature that would make the latter smallest, with what both are then."""
    scores = scores.double()
    temperature = fit_temperature(scores, labels)
    return {
        "ece": calibration_error(scores, labels),
        "nll": _nll(scores, labels),
        "temperature": temperature,
        "ece_tempered": calibration_error(scores / temperature, labels),
        "nll_tempered": _nll(scores / temperature, labels),
    }


def calibration_error(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Mean over pictures of |confidence - accuracy| of their bin of confidence (15 of equal width)."""
    confidence = scores.softmax(dim=1).amax(dim=1)
    right = (best_class(scores) == labels).to(confidence.dtype)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    zeros = torch.zeros(BINS, dtype=confidence.dtype, device=scores.device)
    gap = zeros.index_add(0, bins, confidence - right)
    return gap.abs().sum().item() / len(scores)


def fit_temperature(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Divisor of logits for the smallest negative log-likelihood: between 0.01 and 100, by golden
    section of its logarithm. The likelihood has one peak in 1 / temperature."""
    low, high, ratio = math.log(0.01), math.log(100.0), (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = (_nll(scores / math.exp(x), labels) for x in (left, right))
    while high - low > 1e-4:
        if f_left <= f_right:
            high, right, f_right = right, left, f_left
            left = high - ratio * (high - low)
            f_left = _nll(scores / math.exp(left), labels)
        else:
            low, left, f_left = left, right, f_right
            right = low + ratio * (high - low)
            f_right = _nll(scores / math.exp(right), labels)
    return math.exp((low + high) / 2)


def _nll(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    return torch.nn.functional.cross_entropy(scores, labels).item()


def _interval(metric: str, scores: Tensor, labels: Tensor, seed: int) -> tuple[float, float]:
    """Wilson's for a share of pictures, the bootstrap's for the others."""
    images, classes = scores.shape
    if metric in ("acc1", "acc5"):
        return wilson_interval(METRICS[metric](scores, labels), images)
    hits = (best_class(scores) == labels).double()
    if metric == "mean_per_class_recall":

        def drawn(rows: Tensor) -> float:
            right = torch.bincount(labels[rows], weights=hits[rows], minlength=classes)
            count = torch.bincount(labels[rows], minlength=classes)
            return (right[count > 0] / count[count > 0]).mean().item()

        return bootstrap_interval(drawn, images, seed=seed)
    if metric == "mean_top1_top5":
        each = torch.stack([measures.is_among(scores, labels, top).double() for top in (1, 5)]).mean(dim=0)
        return bootstrap_interval(lambda rows: each[rows].mean().item(), images, seed=seed)
    return bootstrap_interval(lambda rows: METRICS[metric](scores[rows], labels[rows]), images, seed=seed)


def _absent(names: Sequence[str], images: Tensor) -> list[str]:
    absent = [name for name, count in zip(names, images.tolist(), strict=True) if not count]
    if not absent:
        return []
    return [
        f"{len(absent)} of {len(names)} classes have no picture: {', '.join(absent[:5])}{', ...' * (len(absent) > 5)}"
    ]


def _near_chance(metric: str, value: float, interval: tuple[float, float], guess: float | None) -> list[str]:
    """Guessing is what the interval does not exclude."""
    if guess is None or interval[0] > guess:
        return []
    below = "below" if interval[1] < guess else "at"
    return [
        f"{metric} {value:.1%} is {below} chance ({guess:.1%}): nothing was recognised, or labels or prompts are wrong"
    ]
