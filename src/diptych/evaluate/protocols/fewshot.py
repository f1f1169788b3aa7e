"""Protocol `fewshot`: probes on a few images a class, or ImageNet's on a shift (Figures 6, 7 and 15)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.classification import check_scores
from diptych.evaluate.metrics.measures import METRICS
from diptych.evaluate.probe import fewshot
from diptych.evaluate.protocols.frames import follow_frames
from diptych.evaluate.protocols.shifts import (
    IMAGENET,
    Groups,
    ask_few_shots,
    imagenet_groups,
    path_of_imagenet,
    settings_of_probe,
)
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task, class_names
from diptych.evaluate.results import Result, load_result


def few_shot(task: Task) -> tuple[Result, Arrays]:
    """Probes on a few pictures a class, and how many the zero-shot classifier is worth (Figures 6 and 7); of a shift
    without training pictures ImageNet's."""
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups and "train" not in task.splits:
        return _few_shot_of_imagenet(task, groups)
    kind, train = task.used.dataset.kind, task.train
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
    path, test = path_of_imagenet(task, "fewshot"), task.test
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


def _settings(config: EvaluateConfig, model: str, splits: Mapping[str, Samples]) -> dict[str, Any]:
    if "train" not in splits:
        return settings_of_probe(config, model, "fewshot")
    return {"shots": list(config.shots), "seeds": config.seeds}


SPEC = ProtocolSpec(kinds=("single", "multi", "frames"), splits=("test", "train"), measure=few_shot, settings=_settings)
