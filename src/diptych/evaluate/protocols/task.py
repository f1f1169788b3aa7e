"""What is done with a dataset's features, one function a protocol: each returns a Result and what is kept beside it.

The functions are given splits that were opened, checked and embedded, and write nothing. Those that train on pictures
are in protocols_probe.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import ClassIndex
from diptych.evaluate.datasets.registry import ResolvedDataset
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics import measures, overlap
from diptych.evaluate.metrics.classification import Scored, check_scores, score_multi, score_single
from diptych.evaluate.metrics.measures import METRICS, wilson_interval
from diptych.evaluate.models.features import Embedded, EmbedTexts
from diptych.evaluate.protocols.prompts import (
    BARE,
    SIMPLE,
    build_weights,
    embed_templates,
    join_templates,
    search_templates,
)
from diptych.evaluate.protocols.shifts import imagenet_groups, pooled_scores
from diptych.evaluate.results import Protocol, Result

Arrays = Mapping[str, np.ndarray]
KS = (1, 5, 10)
POOLED = "acc1_pooled"
"""Top 1 when all of ImageNet's classes are asked, and each class of a shift takes the best of its own."""
SEARCH_PICTURES = 10_000
"""Pictures that templates are chosen on, at most."""
DEFAULT_PROTOCOL: Mapping[str, Protocol] = {
    "single": "zeroshot",
    "multi": "zeroshot",
    "captions": "retrieval",
    "frames": "temporal",
}
"""What is done with a kind of dataset if nothing else is asked for."""
ALLOWED: Mapping[str, tuple[Protocol, ...]] = {
    "single": ("zeroshot", "prompts", "probe", "fewshot", "overlap"),
    "multi": ("zeroshot", "prompts", "probe", "fewshot"),
    "captions": ("retrieval",),
    "frames": ("temporal", "probe", "fewshot"),
}


NO_CLASSES = ClassIndex(numbers=(), names=(), templates=())
"""Classes of a dataset of captions: none."""
NOTHING = Embedded(kept=(), pooled=torch.empty(0, 0), joint=torch.empty(0, 0), skipped=Counter())
"""What is embedded of a split before it is."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, embedded."""

    samples: Samples
    numbered: ClassIndex
    embedded: Embedded
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
    """What the model multiplies cosines with."""
    embed_texts: EmbedTexts
    used: ResolvedDataset
    splits: Mapping[str, Split]
    earlier: Mapping[Protocol, Result] = field(default_factory=dict)
    """Results of the same model and dataset, by protocol."""

    @property
    def test(self) -> Split:
        return self.splits["test"]

    @property
    def scale(self) -> float:
        """What cosines are multiplied with."""
        return 100.0 if self.used.profile == "clip_benchmark" else self.logit_scale

    def result(self, protocol: Protocol, metric: str, value: float, **fields: Any) -> Result:
        """A Result of this task."""
        test = self.test
        warnings = (*test.warnings, *test.numbered.warnings, *fields.pop("warnings", ()))
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
        """What scores of the test split are worth; `is_probability`: their softmax is what the model believes."""
        check_scores(scores, self.used.dataset.id)
        names = [names[0] for names in self.test.numbered.names]
        seed = self.config.seed
        if self.used.dataset.kind == "multi":
            return score_multi(scores, labels, names, self.used.metric, seed=seed, softmax=is_probability)
        return score_single(scores, labels, names, self.used.metric, seed=seed)


def zero_shot(task: Task) -> tuple[Result, Arrays]:
    """Section 3.1: names in templates, ensembled, against pictures."""
    numbered = task.test.numbered
    scores = zero_shot_scores(task)
    labels = task.test.labels(task.used.dataset.kind)
    scored = task.score(scores, labels, is_probability=True)
    groups = imagenet_groups(task.used, numbered, task.test.samples)
    if groups and (pooled := pooled_scores(task.test.embedded.joint, task.embed_texts, task.used, groups)) is not None:
        scored = replace(scored, metrics={**scored.metrics, POOLED: measures.accuracy(pooled, labels)})
    details = dict(scored.details) | {
        "templates": list(numbered.templates),
        "names": [list(names) for names in numbered.names],
    }
    return from_scores(task, "zeroshot", scored, details), arrays_of(task.test, scores, labels)


def zero_shot_scores(task: Task) -> Tensor:
    """Logits of the test split [N, C]."""
    numbered = task.test.numbered
    weights = build_weights(task.embed_texts, numbered.names, numbered.templates)
    return (task.scale * task.test.embedded.joint) @ weights  # in the order that others multiply in


def prompts(task: Task) -> tuple[Result, Arrays]:
    """The bare name, a sentence, the ensemble, and a forward selection among the ensemble's templates (chosen on the
    training pictures if there are any)."""
    numbered, kind = task.test.numbered, task.used.dataset.kind
    templates = list(dict.fromkeys((BARE, SIMPLE, *numbered.templates)))
    table = embed_templates(task.embed_texts, numbered.names, templates)
    labels, features = task.test.labels(kind), task.test.embedded.joint

    def value(chosen: Sequence[str], features: Tensor = features, labels: Tensor = labels) -> float:
        rows = table[[templates.index(template) for template in chosen]]
        return METRICS[task.used.metric](_ranked(task, features @ join_templates(rows)), labels)

    found = {"bare": value([BARE]), "simple": value([SIMPLE]), "ensemble": value(numbered.templates)}
    warnings = []
    on = task.splits.get("train")
    if on is None:
        on = task.test
        warnings.append("templates were chosen on the pictures that they are measured on: there is no train split")
    some = torch.randperm(len(on.embedded.kept), generator=torch.Generator().manual_seed(task.config.seed))
    some = some[:SEARCH_PICTURES].sort().values
    candidates = table[[templates.index(template) for template in numbered.templates]]
    steps = search_templates(
        on.embedded.joint[some],
        on.labels(kind)[some],
        candidates,
        lambda scores, labels: METRICS[task.used.metric](_ranked(task, scores), labels),
    )
    chosen = [numbered.templates[number] for number, _ in steps]
    search = [[template, value(chosen[: i + 1])] for i, template in enumerate(chosen)]
    best = value(chosen)
    details = {**found, "search": search, "search_pictures": len(some), "search_values": [v for _, v in steps]}
    result = task.result(
        "prompts",
        task.used.metric,
        best,
        metrics={**found, "search": best, task.used.metric: best},
        chance=measures.chance(task.used.metric, len(numbered.names), labels),
        warnings=warnings,
        details=details,
    )
    return result, {}


def _ranked(task: Task, cosines: Tensor) -> Tensor:
    """Scores as the metric wants them."""
    return (task.scale * cosines).double().softmax(dim=1) if task.used.metric == "map_11_point" else cosines


def retrieve(task: Task) -> tuple[Result, Arrays]:
    """Table 13: captions among pictures and pictures among captions."""
    test = task.test
    captions = [[str(one) for one in as_captions(test.samples.labels[i])] for i in test.embedded.kept]
    texts = [task.used.prefix + caption for several in captions for caption in several]
    of_text = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    features = task.embed_texts(texts)
    found = dict(measures.retrieval(test.embedded.joint, features, KS, image_of_text=of_text))
    trials = {"image": len(texts), "text": len(captions)}
    intervals = {name: wilson_interval(value, trials[name.split("_")[0]]) for name, value in found.items()}
    found["mean_recall@1"] = (found["image_retrieval_recall@1"] + found["text_retrieval_recall@1"]) / 2
    details = {"captions": len(texts), "prefix": task.used.prefix, "intervals": intervals}
    result = task.result("retrieval", "mean_recall@1", found["mean_recall@1"], metrics=found, details=details)
    return result, {}


def as_captions(label: object) -> tuple[object, ...]:
    """Captions of one picture."""
    return label if isinstance(label, tuple) else (label,)


def temporal(task: Task) -> tuple[Result, Arrays]:
    """PM-0 and PM-10 of frames of videos."""
    scores, more = zero_shot_scores(task), {}
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups and (pooled := pooled_scores(task.test.embedded.joint, task.embed_texts, task.used, groups)) is not None:
        more = {POOLED: follow_frames(task, pooled)["pm0"]}
    return measure_frames(task, "temporal", scores, more, {"templates": list(task.test.numbered.templates)})


def measure_frames(
    task: Task, protocol: Protocol, scores: Tensor, more: Mapping[str, float], details: Mapping[str, Any]
) -> tuple[Result, Arrays]:
    test = task.test
    check_scores(scores, task.used.dataset.id)
    found = follow_frames(task, scores)
    value, anchors = found[task.used.metric], len(test.samples.sets)
    result = task.result(
        protocol,
        task.used.metric,
        value,
        ci95=wilson_interval(value, anchors),
        chance=measures.chance(task.used.metric, len(test.numbered.names)),
        metrics={**found, **more},
        details={"anchors": anchors, **details},
    )
    first = torch.tensor([test.numbered.numbers[i][0] for i in test.embedded.kept])
    return result, arrays_of(test, scores, first)


def follow_frames(task: Task, scores: Tensor) -> dict[str, float]:
    """PM-0 and PM-10; a frame that could not be decoded is wrong."""
    test = task.test
    predictions = dict.fromkeys(test.samples.keys, -1)
    predictions |= dict(zip(test.keys, scores.argmax(dim=1).tolist(), strict=True))
    labels = dict(zip(test.samples.keys, test.numbered.numbers, strict=True))
    pm0, pm10 = measures.pm_k(predictions, labels, test.samples.sets)
    return {"pm0": pm0, "pm10": pm10}


def measure_overlap(task: Task, overlapping: Sequence[str]) -> tuple[Result, Arrays]:
    """Section 5: accuracy with and without the pictures that were seen in training."""
    scores, labels = zero_shot_scores(task), task.test.labels(task.used.dataset.kind)
    check_scores(scores, task.used.dataset.id)
    right = measures.is_among(scores, labels, 1).tolist()
    present = set(task.test.samples.keys)
    if unknown := sorted(set(overlapping) - present):
        raise UsageError(
            f"{len(unknown)} keys of the overlap are not in {task.used.dataset.id} ({unknown[0]}, ...); take the "
            "overlap of the set that is evaluated"
        )
    answers = dict(zip(task.test.keys, right, strict=True))
    found = overlap.measure_overlap(answers, [key for key in overlapping if key in answers])
    details = {name: value for name, value in vars(found).items() if name != "interval"}
    details["interval"] = list(found.interval)
    result = task.result(
        "overlap",
        "acc1",
        found.acc_all,
        ci95=wilson_interval(found.acc_all, found.images),
        chance=measures.chance("acc1", len(task.test.numbered.names)),
        metrics={"acc1": found.acc_all, "acc_clean": found.acc_clean, "acc_overlap": found.acc_overlap},
        details=details,
    )
    return result, {}


def from_scores(task: Task, protocol: Protocol, scored: Scored, details: Mapping[str, Any]) -> Result:
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
    """What numbers were made of, for a file beside the result."""
    return {
        "scores": scores.float().numpy(),
        "labels": labels.numpy(),
        "keys": np.array(split.keys),
        "names": class_names(split),
    }


def class_names(split: Split) -> np.ndarray:
    return np.array([names[0] for names in split.numbered.names])
