"""Protocol `zeroshot`: class names in templates, ensembled, against images (section 3.1)."""

from dataclasses import replace

from torch import Tensor

from diptych.evaluate.datasets.registry import load_dataset_entry
from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.robustness import IMAGENET, map_classes
from diptych.evaluate.protocols.shifts import imagenet_groups
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task, arrays_of, from_scores
from diptych.evaluate.results import Result
from diptych.zeroshot import build_classifier

POOLED = "acc1_pooled"
"""Top 1 when all of ImageNet's classes are asked, and each class of a shift takes the best of its own."""


def zero_shot(task: Task) -> tuple[Result, Arrays]:
    """Section 3.1: names in templates, ensembled, against pictures."""
    numbered = task.test.numbered
    scores = zero_shot_scores(task)
    labels = task.test.labels(task.used.dataset.kind)
    scored = task.score(scores, labels, is_probability=True)
    if (pooled := pooled_scores(task)) is not None:
        scored = replace(scored, metrics={**scored.metrics, POOLED: measures.accuracy(pooled, labels)})
    details = dict(scored.details) | {
        "templates": list(numbered.templates),
        "names": [list(names) for names in numbered.names],
    }
    return from_scores(task, "zeroshot", scored, details), arrays_of(task.test, scores, labels)


def zero_shot_scores(task: Task) -> Tensor:
    """Logits of the test split [N, C]."""
    numbered = task.test.numbered
    weights = build_classifier(task.embed_texts, numbered.names, numbered.templates)
    return (task.scale * task.test.embedded.joint) @ weights  # in the order that others multiply in


def pooled_scores(task: Task) -> Tensor | None:
    """Cosines of images with all of ImageNet's classes, pooled into those of a shift; None for a set that is no shift,
    and where each class is one of ImageNet's, which gives nothing that its own names do not."""
    groups = imagenet_groups(task.used, task.test.numbered, task.test.samples)
    if groups is None or all(len(group) == 1 for group in groups):
        return None
    imagenet = load_dataset_entry(IMAGENET).resolve(task.used.profile)
    weights = build_classifier(task.embed_texts, imagenet.names, imagenet.templates)
    return map_classes(task.test.embedded.joint @ weights, groups)


SPEC = ProtocolSpec(kinds=("single", "multi"), measure=zero_shot)
