"""Shifts, sets whose classes are ImageNet's: the groups of its classes, and scores of ImageNet's probes.

A class of such a set covers one or several classes of ImageNet and takes the best score among them (section 3.3, as
wise-ft has it). That is what adapting to a set's own class names is compared with, and how probes that
were trained on ImageNet, on all its pictures (Figure 14) or on few (Figure 15), answer about a shift.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych import files
from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import ClassIndex
from diptych.evaluate.datasets.registry import ResolvedDataset, load_dataset_entry, match_classes
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.metrics.robustness import IMAGENET, map_classes
from diptych.evaluate.protocols.task import Task
from diptych.evaluate.references import SHIFTS
from diptych.evaluate.results import Protocol, result_path

Groups = tuple[tuple[int, ...], ...]


def imagenet_groups(used: ResolvedDataset, numbered: ClassIndex, samples: Samples) -> Groups | None:
    """For each class of a set the classes of ImageNet that it covers, as the registry or the source says, in the order
    of its labels; None if it has none, or if its source has an order of its own."""
    entry = used.dataset
    if entry.id == IMAGENET or numbered.names != used.names:
        return None
    if entry.imagenet_groups:
        groups = entry.imagenet_groups
    elif entry.class_list == IMAGENET:
        groups = tuple((number,) for number in entry.subset or range(len(entry.classes)))
    elif samples.imagenet_groups and samples.classnames:
        of_class = dict(zip(match_classes(entry, samples.classnames), samples.imagenet_groups, strict=True))
        groups = tuple(of_class[number] for number in range(len(entry.classes)))
    else:
        return None
    return tuple(groups[number] for number in used.order)


def imagenet_subsets() -> dict[str, list[int]]:
    """Shift -> the classes of ImageNet that it covers, of the shifts that do not have all of them."""
    found = {}
    for shift in SHIFTS:
        entry = load_dataset_entry(shift)
        classes = sorted({number for group in entry.imagenet_groups for number in group}) or list(entry.subset)
        if classes:
            found[shift] = classes
    return found


def probe_of_imagenet(out: Path, model: str, protocol: Protocol) -> Path:
    """Where the probe lies that was trained on ImageNet, on all pictures or on few."""
    return result_path(out, model, IMAGENET, protocol).with_suffix(".npz")


def settings_of_probe(config: EvaluateConfig, model: str, protocol: Protocol) -> dict[str, str]:
    """The probe of ImageNet that a result depends on, where a shift has no training pictures of its own."""
    path = probe_of_imagenet(config.out, model, protocol)
    return {"probe": files.xxh3(path) if path.is_file() else ""}


def path_of_imagenet(task: Task, protocol: Protocol) -> Path:
    """Where ImageNet's probe lies; UsageError if it does not."""
    path = probe_of_imagenet(task.config.out, task.model, protocol)
    if not path.is_file():
        raise UsageError(
            f"{task.used.dataset.id} has no train split here, and {path} is not there: first evaluate imagenet with "
            f"--protocols {protocol} into the same folder"
        )
    return path


def ask_probe(path: Path, pooled: Float[Tensor, "N D"], groups: Groups, profile: str) -> Float[Tensor, "N G"]:
    """Scores of the probe that was trained on ImageNet, pooled."""
    with np.load(path) as kept:
        _check_kept(path, kept, "probe", profile)
        return _ask(kept["weight"], kept["bias"], pooled, groups)


def ask_few_shots(
    path: Path, pooled: Float[Tensor, "N D"], groups: Groups, profile: str
) -> Iterator[tuple[int, list[Float[Tensor, "N G"]]]]:
    """Pooled scores of the probes that were trained on few of ImageNet's pictures: shots, and scores for each draw."""
    with np.load(path) as kept:
        _check_kept(path, kept, "fewshot", profile)
        for shots in kept["shots"].tolist():
            draws = zip(kept[f"weight_{shots}"], kept[f"bias_{shots}"], strict=True)
            yield shots, [_ask(weight, bias, pooled, groups) for weight, bias in draws]


def _check_kept(path: Path, kept: Mapping[str, np.ndarray], protocol: Protocol, profile: str) -> None:
    """UsageError for a file without weights, and for classes of another profile."""
    if {"probe": "weight", "fewshot": "shots"}[protocol] not in kept:
        raise UsageError(f"{path} has no weights; make it again: --suite imagenet --protocols {protocol} --redo")
    if kept["names"].tolist() != [several[0] for several in load_dataset_entry(IMAGENET).resolve(profile).names]:
        raise UsageError(f"{path} has classes in another order than the registry; evaluate imagenet in profile paper")


def _ask(weight: np.ndarray, bias: np.ndarray, pooled: Tensor, groups: Groups) -> Tensor:
    scores = pooled.double() @ torch.from_numpy(weight).double().T + torch.from_numpy(bias).double()
    return map_classes(scores, groups).float()
