"""A model on a dataset as the protocols see it: splits that were opened, checked and embedded.

Every protocol is a module of this folder, called by its name, with a function that takes a Task and returns a Result
and the arrays that are kept beside it; it writes nothing. Its `SPEC` stands in the table in evaluate/cell.py.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import ClassIndex, doubt_names
from diptych.evaluate.datasets.registry import DatasetKind, ResolvedDataset
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics.classification import Scored, check_scores, score_multi, score_single
from diptych.evaluate.models.features import SplitFeatures
from diptych.evaluate.results import Protocol, Result

Arrays = Mapping[str, np.ndarray]
NOTHING = SplitFeatures(kept=(), pooled=torch.empty(0, 0), joint=torch.empty(0, 0), skipped=Counter())
"""Features of a split that is not embedded yet."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, embedded."""

    samples: Samples
    numbered: ClassIndex
    embedded: SplitFeatures
    warnings: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [self.samples.keys[i] for i in self.embedded.kept]

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self.samples.skipped + self.embedded.skipped)

    @property
    def folds(self) -> list[Tensor]:
        """Rows of each fold that have features; none if there are no folds."""
        row = {sample: row for row, sample in enumerate(self.embedded.kept)}
        return [torch.tensor([row[i] for i in fold if i in row], dtype=torch.int64) for fold in self.samples.folds]

    def labels(self, kind: str) -> Tensor:
        """Class numbers [N], or 0 and 1 [N, C]."""
        several = [self.numbered.numbers[i] for i in self.embedded.kept]
        if kind != "multi":
            return torch.tensor([numbers[0] for numbers in several], dtype=torch.int64)
        targets = torch.zeros(len(several), len(self.numbered.names))
        for row, numbers in enumerate(several):
            targets[row, list(numbers)] = 1
        return targets


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, a dataset, and the splits that a protocol asked for."""

    config: EvaluateConfig
    model: str
    logit_scale: float
    """The model's own scale of cosines."""
    embed_texts: Callable[[Sequence[str]], Tensor]
    """Texts to their features [N, E], normalised."""
    used: ResolvedDataset
    splits: Mapping[str, Split]
    earlier: Mapping[Protocol, Result] = field(default_factory=dict)
    """Results of the same model and dataset, by protocol."""

    @property
    def test(self) -> Split:
        return self.splits["test"]

    @property
    def train(self) -> Split:
        """The training split; UsageError if there is none."""
        if "train" not in self.splits:
            raise UsageError(f"{self.used.dataset.id} has no train split here")
        return self.splits["train"]

    @property
    def scale(self) -> float:
        """The scale of cosines in this profile."""
        return 100.0 if self.used.profile == "clip_benchmark" else self.logit_scale

    def result(self, protocol: Protocol, metric: str, value: float, **fields: Any) -> Result:
        """A Result of this task."""
        test = self.test
        warnings = (*test.warnings, *test.numbered.warnings, *fields.pop("warnings", ()))
        if protocol in ("zeroshot", "prompts") and not self.used.names:
            warnings += doubt_names([names[0] for names in test.numbered.names])
        return Result(
            model=self.model,
            dataset=self.used.dataset.id,
            protocol=protocol,
            metric=metric,
            value=value,
            images=len(test.embedded.kept),
            profile=self.used.profile,
            skipped=test.skipped,
            warnings=warnings,
            **fields,
        )

    def score(self, scores: Tensor, labels: Tensor, *, is_probability: bool) -> Scored:
        """Metrics of the test split. Set `is_probability` where the softmax of the scores is the model's belief."""
        check_scores(scores, self.used.dataset.id)
        names = [names[0] for names in self.test.numbered.names]
        seed = self.config.seed
        if self.used.dataset.kind == "multi":
            return score_multi(scores, labels, names, self.used.metric, seed=seed, softmax=is_probability)
        return score_single(scores, labels, names, self.used.metric, seed=seed)


@dataclass(frozen=True, kw_only=True)
class ProtocolSpec:
    """One row of the table of protocols."""

    kinds: tuple[DatasetKind, ...]
    """Kinds of dataset that it is for."""
    splits: tuple[str, ...] = ("test",)
    """Splits that it looks at; all but test may not be there."""
    measure: Callable[[Task], tuple[Result, Arrays]]
    settings: Callable[[EvaluateConfig, str, Mapping[str, Samples]], dict[str, Any]] = lambda *_: {}
    """More that a result depends on, as JSON gives it back: of the options, the model's name and the opened splits."""


def from_scores(task: Task, protocol: Protocol, scored: Scored, details: Mapping[str, Any]) -> Result:
    """A Result of a task from its scores."""
    return task.result(
        protocol,
        scored.metric,
        scored.value,
        ci95=scored.ci95,
        chance=task.used.dataset.chance or scored.chance,
        metrics=scored.metrics,
        per_class=scored.per_class,
        warnings=scored.warnings,
        details=details,
    )


def arrays_of(split: Split, scores: Tensor, labels: Tensor) -> Arrays:
    """Scores, labels and keys that numbers were made of, for a file beside the result."""
    return {
        "scores": scores.float().numpy(),
        "labels": labels.numpy(),
        "keys": np.array(split.keys),
        "names": class_names(split),
    }


def class_names(split: Split) -> np.ndarray:
    """The first name of every class."""
    return np.array([names[0] for names in split.numbered.names])
