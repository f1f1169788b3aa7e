"""Frames of videos: whether an anchor and all its neighbours are right (PM-k, Table 16)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.classification import check_scores
from diptych.evaluate.metrics.measures import wilson_interval
from diptych.evaluate.protocols.task import Arrays, Task, arrays_of
from diptych.evaluate.results import Protocol, Result


def measure_frames(
    task: Task, protocol: Protocol, scores: Tensor, more: Mapping[str, float], details: Mapping[str, Any]
) -> tuple[Result, Arrays]:
    """A Result from scores of frames; `more` metrics and `details` come beside its own."""
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
