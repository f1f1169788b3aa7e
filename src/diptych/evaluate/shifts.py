"""What ImageNet's classes say of a set whose classes are theirs: zero-shot by all 1,000 names, and ImageNet's probe.

A class of such a set covers one or several classes of ImageNet and takes the best score among them (section 3.3, as
wise-ft has it). That is what adapting to a set's own class names is compared with (Figure 14), and how a probe that was
trained on ImageNet answers about a shift.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import UsageError
from diptych.evaluate.labels import Numbered
from diptych.evaluate.prompts import EmbedTexts, build_weights
from diptych.evaluate.references import SHIFTS
from diptych.evaluate.registry import Used, load_dataset
from diptych.evaluate.results import result_path
from diptych.evaluate.robustness import IMAGENET, map_classes

Groups = tuple[tuple[int, ...], ...]


def imagenet_groups(used: Used, numbered: Numbered) -> Groups | None:
    """For each class of a set the classes of ImageNet that it covers, in the order of its labels; None if it has none,
    or if its source has an order of its own."""
    entry = used.dataset
    if entry.id == IMAGENET or numbered.names != used.names:
        return None
    if entry.imagenet_groups:
        groups = entry.imagenet_groups
    elif entry.class_list == IMAGENET:
        groups = tuple((number,) for number in entry.subset or range(len(entry.classes)))
    else:
        return None
    return tuple(groups[number] for number in used.order)


def imagenet_subsets() -> dict[str, list[int]]:
    """Shift -> the classes of ImageNet that it covers, of the shifts that do not have all of them."""
    found = {}
    for shift in SHIFTS:
        entry = load_dataset(shift)
        classes = sorted({number for group in entry.imagenet_groups for number in group}) or list(entry.subset)
        if classes:
            found[shift] = classes
    return found


def pooled_scores(
    joint: Float[Tensor, "N E"], embed: EmbedTexts, used: Used, groups: Groups
) -> Float[Tensor, "N G"] | None:
    """Cosines of pictures with all of ImageNet's classes, pooled; None where each class is one of ImageNet's, which
    gives nothing that its own names do not."""
    if all(len(group) == 1 for group in groups):
        return None
    imagenet = load_dataset(IMAGENET).as_used(used.profile)
    return map_classes(joint @ build_weights(embed, imagenet.names, imagenet.templates), groups)


def probe_of_imagenet(out: Path, model: str) -> Path:
    """Where the probe lies that was trained on ImageNet."""
    return result_path(out, model, IMAGENET, "probe").with_suffix(".npz")


def ask_probe(path: Path, pooled: Float[Tensor, "N D"], groups: Groups, profile: str) -> Float[Tensor, "N G"]:
    """Scores of the probe that was trained on ImageNet, pooled."""
    with np.load(path) as kept:
        if "weight" not in kept:
            raise UsageError(f"{path} has no weights; make it again: --suite imagenet --protocols probe --redo")
        weight, bias = torch.from_numpy(kept["weight"]).double(), torch.from_numpy(kept["bias"]).double()
        names = kept["names"].tolist()
    if names != [several[0] for several in load_dataset(IMAGENET).as_used(profile).names]:
        raise UsageError(f"{path} has classes in another order than the registry; evaluate imagenet in profile paper")
    return map_classes(pooled.double() @ weight.T + bias, groups).float()
