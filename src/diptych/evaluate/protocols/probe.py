"""Protocols that train on pictures: linear probes and few-shot, and what ImageNet's say of its shifts.

As in protocols.py each returns a Result and what is kept beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.classification import check_scores
from diptych.evaluate.metrics.measures import METRICS
from diptych.evaluate.probe import fewshot
from diptych.evaluate.probe.search import ProbeReport, linear_probe
from diptych.evaluate.protocols.shifts import (
    IMAGENET,
    Groups,
    ask_few_shots,
    ask_probe,
    imagenet_groups,
    probe_of_imagenet,
)
from diptych.evaluate.protocols.task import (
    Arrays,
    Split,
    Task,
    arrays_of,
    class_names,
    follow_frames,
    from_scores,
    measure_frames,
)
from diptych.evaluate.results import Protocol, Result, load_result


def probe(task: Task) -> tuple[Result, Arrays]:
    """The paper's linear probe, on features before the projection (Appendix A.3), or one of each fold; of a shift
    without training pictures ImageNet's."""
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups and "train" not in task.splits:
        return _probe_of_imagenet(task, groups)
    train = _train(task)
    if folds := train.folds:
        return _probe_folds(task, train, folds)
    labels = task.test.labels(task.used.dataset.kind)
    report = _train_probe(task, train, slice(None))
    scored = task.score(report.predictions, labels, is_probability=False)
    details = dict(scored.details) | {
        "l2": report.l2,
        "validation": [list(pair) for pair in report.validation],
        "validation_value": report.value,
        "train_images": report.train_images,
        "converged": report.converged,
        "seconds": report.seconds,
    }
    kept = {"weight": report.weight.cpu().numpy(), "bias": report.bias.cpu().numpy()}
    return from_scores(task, "probe", scored, details), {**arrays_of(task.test, report.predictions, labels), **kept}


def _train_probe(task: Task, train: Split, rows: Tensor | slice) -> ProbeReport:
    """A probe of some rows of the training pictures."""
    kind, val = task.used.dataset.kind, task.splits.get("val")
    return linear_probe(
        train.embedded.pooled[rows],
        train.labels(kind)[rows],
        task.test.embedded.pooled,
        task.test.labels(kind),
        classes=len(task.test.numbered.names),
        val=(val.embedded.pooled, val.labels(kind)) if val is not None else None,
        metric=METRICS[task.used.metric],
        seed=task.config.seed,
    )


def _probe_folds(task: Task, train: Split, folds: Sequence[Tensor]) -> tuple[Result, Arrays]:
    """A probe of each fold of the training pictures, with a search of its own; the value is their mean (STL-10)."""
    reports = [_train_probe(task, train, rows) for rows in folds]
    values = [report.value for report in reports]
    kind, classes = task.used.dataset.kind, len(task.test.numbered.names)
    labels = task.test.labels(kind)
    result = task.result(
        "probe",
        task.used.metric,
        fmean(values),
        ci95=measures.wilson_interval(fmean(values), len(labels)) if task.used.metric == "acc1" else None,
        chance=task.used.dataset.chance or measures.chance(task.used.metric, classes, labels),
        metrics={task.used.metric: fmean(values)},
        details={
            "folds": values,
            "l2": geometric_mean([report.l2 for report in reports]),
            "validation": [list(pair) for report in reports for pair in report.validation],
            "train_images": round(fmean([report.train_images for report in reports])),
            "converged": all(report.converged for report in reports),
            "seconds": sum(report.seconds for report in reports),
        },
    )
    scores = {f"scores_{i}": report.predictions.numpy() for i, report in enumerate(reports)}
    return result, {
        **scores,
        "labels": labels.numpy(),
        "keys": np.array(task.test.keys),
        "names": class_names(task.test),
    }


def _probe_of_imagenet(task: Task, groups: Groups) -> tuple[Result, Arrays]:
    """The probe that was trained on ImageNet, asked about a set of ImageNet's classes (Figure 14)."""
    path = _path_of_imagenet(task, "probe")
    scores = ask_probe(path, task.test.embedded.pooled, groups, task.used.profile)
    earlier = load_result(path.with_suffix(".json")).details
    details = {name: earlier[name] for name in ("l2", "validation", "train_images", "converged")}
    details["trained_on"] = IMAGENET
    if task.used.dataset.kind == "frames":
        return measure_frames(task, "probe", scores, {}, details)
    labels = task.test.labels(task.used.dataset.kind)
    scored = task.score(scores, labels, is_probability=False)
    return from_scores(task, "probe", scored, {**scored.details, **details}), arrays_of(task.test, scores, labels)


def _path_of_imagenet(task: Task, protocol: Protocol) -> Path:
    """Where ImageNet's probe lies; UsageError if it does not."""
    path = probe_of_imagenet(task.config.out, task.model, protocol)
    if not path.is_file():
        raise UsageError(
            f"{task.used.dataset.id} has no train split here, and {path} is not there: first evaluate imagenet with "
            f"--protocols {protocol} into the same folder"
        )
    return path


def few_shot(task: Task) -> tuple[Result, Arrays]:
    """Probes on a few pictures a class, and how many the zero-shot classifier is worth (Figures 6 and 7); of a shift
    without training pictures ImageNet's."""
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups and "train" not in task.splits:
        return _few_shot_of_imagenet(task, groups)
    kind, train = task.used.dataset.kind, _train(task)
    classes = len(task.test.numbered.names)
    report = fewshot.few_shot(
        train.embedded.pooled,
        train.labels(kind),
        task.test.embedded.pooled,
        task.test.labels(kind),
        classes=classes,
        shots=task.config.shots,
        seeds=task.config.seeds,
        metric=METRICS[task.used.metric],
        keep=task.used.dataset.id == IMAGENET,
    )
    means = report.means()
    zero, full = task.earlier.get("zeroshot"), task.earlier.get("probe")
    efficiency = None
    if zero is not None:
        each = (full.details["train_images"] / classes, full.value) if full is not None else None
        efficiency = fewshot.data_efficiency(zero.value, means, each)
    warnings = [
        f"{count} shots were left out: {few} classes have fewer training pictures"
        for count, few in report.skipped.items()
    ]
    details = {
        "train_images": {str(count): images for count, images in report.train_images.items()},
        "efficiency": efficiency,
        "l2": report.l2,
        "seconds": report.seconds,
    }
    kept: dict[str, np.ndarray] = {}
    if report.weights:
        kept = {"shots": np.array(list(report.weights)), "names": class_names(task.test)}
        kept |= {f"weight_{count}": weight.cpu().numpy() for count, weight in report.weights.items()}
        kept |= {f"bias_{count}": bias.cpu().numpy() for count, bias in report.biases.items()}
    return _from_shots(task, report.values, details, warnings), kept


def _few_shot_of_imagenet(task: Task, groups: Groups) -> tuple[Result, Arrays]:
    """The probes that were trained on few of ImageNet's pictures, asked about a set of its classes (Figure 15)."""
    path, test = _path_of_imagenet(task, "fewshot"), task.test
    labels = test.labels(task.used.dataset.kind)

    def value(scores: Tensor) -> float:
        check_scores(scores, task.used.dataset.id)
        if task.used.dataset.kind == "frames":
            return follow_frames(task, scores)[task.used.metric]
        return METRICS[task.used.metric](scores, labels)

    asked = ask_few_shots(path, test.embedded.pooled, groups, task.used.profile)
    values = {shots: tuple(map(value, draws)) for shots, draws in asked}
    earlier = load_result(path.with_suffix(".json")).details
    details = {name: earlier[name] for name in ("train_images", "l2")} | {"trained_on": IMAGENET}
    return _from_shots(task, values, details), {}


def _from_shots(
    task: Task, values: Mapping[int, Sequence[float]], details: Mapping[str, Any], warnings: Sequence[str] = ()
) -> Result:
    """Shots -> a value for each draw; the headline is the mean of most shots."""
    means = {count: sum(draws) / len(draws) for count, draws in values.items()}
    headline, kind = means[max(means)], task.used.dataset.kind
    targets = task.test.labels(kind) if kind != "frames" else None
    return task.result(
        "fewshot",
        task.used.metric,
        headline,
        metrics={f"{count}_shot": mean for count, mean in means.items()} | {task.used.metric: headline},
        chance=measures.chance(task.used.metric, len(task.test.numbered.names), targets),
        warnings=warnings,
        details={"shots": {str(count): list(draws) for count, draws in values.items()}, **details},
    )


def _train(task: Task) -> Split:
    train = task.splits.get("train")
    if train is None:
        raise UsageError(f"{task.used.dataset.id} has no train split here")
    return train
