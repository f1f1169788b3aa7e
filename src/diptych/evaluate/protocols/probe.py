"""Protocol `probe`: logistic regression on features before the projection (A.3), or ImageNet's probe on a shift."""

from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
from torch import Tensor

from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.measures import METRICS
from diptych.evaluate.probe.search import ProbeReport, linear_probe
from diptych.evaluate.protocols.frames import measure_frames
from diptych.evaluate.protocols.shifts import (
    IMAGENET,
    Groups,
    ask_probe,
    imagenet_groups,
    path_of_imagenet,
    settings_of_probe,
)
from diptych.evaluate.protocols.task import (
    Arrays,
    ProtocolSpec,
    Split,
    Task,
    arrays_of,
    class_names,
    from_scores,
)
from diptych.evaluate.results import Result, load_result


def probe(task: Task) -> tuple[Result, Arrays]:
    """The paper's linear probe, on features before the projection (Appendix A.3), or one of each fold; of a shift
    without training pictures ImageNet's."""
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups and "train" not in task.splits:
        return _probe_of_imagenet(task, groups)
    train = task.train
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
    path = path_of_imagenet(task, "probe")
    scores = ask_probe(path, task.test.embedded.pooled, groups, task.used.profile)
    earlier = load_result(path.with_suffix(".json")).details
    details = {name: earlier[name] for name in ("l2", "validation", "train_images", "converged")}
    details["trained_on"] = IMAGENET
    if task.used.dataset.kind == "frames":
        return measure_frames(task, "probe", scores, {}, details)
    labels = task.test.labels(task.used.dataset.kind)
    scored = task.score(scores, labels, is_probability=False)
    return from_scores(task, "probe", scored, {**scored.details, **details}), arrays_of(task.test, scores, labels)


def _settings(config: EvaluateConfig, model: str, splits: Mapping[str, Samples]) -> dict[str, Any]:
    return {} if "train" in splits else settings_of_probe(config, model, "probe")


SPEC = ProtocolSpec(
    kinds=("single", "multi", "frames"), splits=("test", "train", "val"), measure=probe, settings=_settings
)
