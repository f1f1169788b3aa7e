"""Adapting to ImageNet with few pictures (Figure 15): few-shot probes of its classes, asked about its shifts.

A shift has no training pictures. Its classes are ImageNet's, or groups of them; of a group the highest score counts.
The few-shot probe (`fewshot.few_shot`) comes in as a function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.metrics import accuracy
from diptych.evaluate.results import Result
from diptych.evaluate.robustness import IMAGENET, map_classes

Metric = Callable[[Tensor, Tensor], float]


class HasValues(Protocol):
    """What a few-shot probe returns, as far as it is used here."""

    @property
    def values(self) -> Mapping[int, Sequence[float]]:
        """Shots -> the metric for each draw."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Pictures of a shift, embedded as ImageNet's are."""

    features: Float[Tensor, "M D"]
    labels: Int[Tensor, " labels"]
    """Among the classes of the shift, one a picture."""
    groups: Sequence[Sequence[int]]
    """For each class of the shift, its classes of ImageNet."""
    metric: Metric = accuracy
    """Of scores over the shift's classes, and labels."""

    def measure(self, scores: Float[Tensor, "M C"]) -> float:
        """What scores over ImageNet's classes are worth."""
        return self.metric(map_classes(scores, self.groups), self.labels)


def adapt_few_shot(
    few_shot: Callable[..., HasValues],
    train: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    shifts: Mapping[str, Shift],
    *,
    classes: int,
    shots: Sequence[int],
    seeds: int = 10,
) -> dict[str, dict[int, tuple[float, ...]]]:
    """Learn ImageNet from few pictures of each class, and ask about shifts.

    Returns name -> shots -> a value for each draw; `few_shot` draws the same pictures for every shift.
    """
    _check(shifts)
    found = {}
    for name, shift in shifts.items():

        def measure(scores: Tensor, _: Tensor, shift: Shift = shift) -> float:
            return shift.measure(scores)

        known = _as_imagenet(shift)
        arguments: dict[str, Any] = {"classes": classes, "shots": shots, "seeds": seeds, "metric": measure}
        report = few_shot(train, train_labels, shift.features, known, **arguments)
        found[name] = {count: tuple(values) for count, values in report.values.items()}
    return found


def few_shot_result(
    model: str, shift: str, values: Mapping[int, Sequence[float]], *, metric: str, images: int, train_images: int
) -> Result:
    """Few-shot values under a shift, as figures look for them; the headline is that of most shots."""
    means = {count: sum(draws) / len(draws) for count, draws in values.items()}
    return Result(
        model=model,
        dataset=shift,
        protocol="fewshot",
        metric=metric,
        value=means[max(means)],
        images=images,
        metrics={f"{count}_shot": mean for count, mean in means.items()} | {metric: means[max(means)]},
        details={
            "trained_on": IMAGENET,
            "shots": {str(count): list(draws) for count, draws in sorted(values.items())},
            "train_images": train_images,
        },
    )


def _as_imagenet(shift: Shift) -> Int[Tensor, " labels"]:
    """Labels among ImageNet's classes: the first of each group, or any for a group without classes."""
    return torch.tensor([group[0] if group else 0 for group in shift.groups])[shift.labels]


def _check(shifts: Mapping[str, Shift]) -> None:
    if not shifts:
        raise UsageError("no shift was given; give at least one")
    for name, shift in shifts.items():
        if len(shift.labels) != len(shift.features):
            raise UsageError(
                f"{name} has {len(shift.features)} features and {len(shift.labels)} labels; every picture needs a label"
            )
        if len(shift.labels) and not 0 <= int(shift.labels.min()) <= int(shift.labels.max()) < len(shift.groups):
            raise UsageError(f"{name} has labels beyond its {len(shift.groups)} classes")
