"""How good it is: the paper's metrics and CLIP_benchmark's, with their intervals, and retrieval.

Scores are [N, C], higher is likelier; labels are class numbers [N], or 0 and 1 [N, C] where a picture has several.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.ranks import Ranks

_ROWS = 1024
"""Queries that are ranked at a time, so that no N x N matrix is held."""


def accuracy(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], top: int = 1) -> float:
    """Share of rows whose label is among the `top` highest scores, 0..1.

    Of equal scores the lower class index counts as higher, so that a constant classifier is not right by tie.
    """
    return is_among(scores, labels, top).double().mean().item()


def is_among(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], top: int) -> Bool[Tensor, " N"]:
    """Whether the label is among the `top` highest scores."""
    of_label = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > of_label) | ((scores == of_label) & (index < labels[:, None]))
    return ahead.sum(dim=1) < top


def wilson_interval(share: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share of `trials`, 95 % by default."""
    if not trials:
        return 0.0, 1.0
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + sign * half) / (1 + z**2 / trials) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def classification(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> dict[str, float | list[float] | int]:
    """Top-1 and top-5 accuracy beside what guessing would reach, and the 95 % interval of the former."""
    images, classes = scores.shape
    acc1 = accuracy(scores, labels)
    return {
        "acc1": acc1,
        "acc5": accuracy(scores, labels, top=5),
        "chance": 1 / classes,
        "ci95": list(wilson_interval(acc1, images)),
        "classes": classes,
        "images": images,
    }


def mean_per_class_recall(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Top-1 accuracy of each class that has pictures, averaged over those classes: rare ones count like common ones."""
    recalls = [accuracy(scores[labels == label], labels[labels == label]) for label in labels.unique()]
    return sum(recalls) / len(recalls) if recalls else 0.0


def mean_top1_top5(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """The mean of top-1 and top-5 accuracy: Kinetics' own metric."""
    return (accuracy(scores, labels) + accuracy(scores, labels, top=5)) / 2


def roc_auc(scores: Float[Tensor, "N 2"], labels: Int[Tensor, " N"]) -> float:
    """How often a picture of class 1 is scored above one of class 0 (by score 1 - score 0); a tie counts half.

    NaN if a class has no pictures.
    """
    margin = (scores[:, 1].double() - scores[:, 0].double()).cpu()
    _, place, counts = margin.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks_of = (ends - (counts.double() - 1) / 2)[place]  # the mean rank of equal values, from 1
    positive = labels.cpu() == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return math.nan
    return (ranks_of[positive].sum().item() - ones * (ones + 1) / 2) / (ones * zeros)


def average_precision(scores: Float[Tensor, " N"], targets: Float[Tensor, " N"] | Int[Tensor, " N"]) -> float:
    """Mean over the positives, best first, of the precision at their place; NaN without one. As CLIP_benchmark has it;
    it differs from scikit-learn's only where scores are equal."""
    truth = targets[scores.sort(descending=True).indices].double()
    if not truth.any():
        return math.nan
    precision = truth.cumsum(0) / torch.arange(1, len(truth) + 1, device=truth.device)
    return (precision * truth).sum().item() / truth.sum().item()


def average_precision_11(scores: Float[Tensor, " N"], targets: Float[Tensor, " N"] | Int[Tensor, " N"]) -> float:
    """VOC 2007's: the mean over recalls 0, 0.1, ..., 1 of the best precision at that recall or more; NaN without a
    positive. Equal scores come in together."""
    ordered, order = scores.sort(descending=True)
    hits = targets[order].double().cumsum(0)
    if not len(hits) or not hits[-1]:
        return math.nan
    last = torch.ones(len(hits), dtype=torch.bool, device=hits.device)
    last[:-1] = ordered[1:] != ordered[:-1]
    seen = torch.arange(1, len(hits) + 1, device=hits.device, dtype=torch.float64)[last]
    precision, recall = hits[last] / seen, hits[last] / hits[-1]
    best = precision.flip(0).cummax(0).values.flip(0)
    levels = [best[recall >= i / 10 - 1e-12] for i in range(11)]
    return sum(level[0].item() for level in levels) / 11


def mean_over_classes(
    metric: Callable[[Tensor, Tensor], float], scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]
) -> float:
    """The mean over the classes that have a positive."""
    values = [metric(scores[:, c], targets[:, c]) for c in range(scores.shape[1])]
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def map_11_point(scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> float:
    """Mean 11-point average precision. Zero-shot scores are made probabilities first: the softmax over the classes
    changes the order of pictures (openai/CLIP#153)."""
    return mean_over_classes(average_precision_11, scores, targets)


def mean_average_precision(scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> float:
    """Mean average precision, as CLIP_benchmark has it."""
    return mean_over_classes(average_precision, scores, targets)


def pm_k(
    predictions: Mapping[str, int], labels: Mapping[str, Sequence[int]], sets: Mapping[str, Sequence[str]]
) -> tuple[float, float]:
    """PM-0 and PM-k: the share of anchors that are right, and of anchors that are right with all their neighbours.

    A frame is right if the prediction is one of its labels; a neighbour without labels has those of its anchor.
    """
    right = {anchor: predictions[anchor] in labels[anchor] for anchor in sets}
    held = [
        right[anchor] and all(predictions[frame] in labels.get(frame, labels[anchor]) for frame in frames)
        for anchor, frames in sets.items()
    ]
    return sum(right.values()) / max(1, len(sets)), sum(held) / max(1, len(sets))


Metric = Callable[[Tensor, Tensor], float]
METRICS: dict[str, Metric] = {
    "acc1": accuracy,
    "acc5": lambda scores, labels: accuracy(scores, labels, top=5),
    "mean_per_class_recall": mean_per_class_recall,
    "mean_top1_top5": mean_top1_top5,
    "roc_auc": roc_auc,
    "map_11_point": map_11_point,
    "mean_average_precision": mean_average_precision,
}
"""By name: scores and labels to a number between 0 and 1."""


def chance(metric: str, classes: int, labels: Tensor | None = None) -> float | None:
    """Value that guessing reaches: drawn classes, or scores drawn at random; None if that is not known."""
    match metric:
        case "acc1" | "mean_per_class_recall" | "pm0":
            return 1 / classes
        case "acc5":
            return min(1.0, 5 / classes)
        case "mean_top1_top5":
            return (1 / classes + min(1.0, 5 / classes)) / 2
        case "roc_auc":
            return 0.5
        case "map_11_point" | "mean_average_precision" if labels is not None:
            generator = torch.Generator().manual_seed(0)
            drawn = [METRICS[metric](torch.rand(labels.shape, generator=generator), labels) for _ in range(10)]
            return sum(drawn) / len(drawn)
    return None


def bootstrap_interval(
    metric: Callable[[Tensor], float], images: int, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a metric of pictures: what it is for `draws` sets drawn from them with replacement."""
    generator = torch.Generator().manual_seed(seed)
    values = [metric(torch.randint(images, (images,), generator=generator)) for _ in range(draws)]
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(known):
        return 0.0, 1.0
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def retrieval(
    image_features: Float[Tensor, "N E"],
    text_features: Float[Tensor, "M E"],
    ks: tuple[int, ...] = (1, 5, 10),
    *,
    image_of_text: Int[Tensor, " M"] | None = None,
    ranks: Ranks | None = None,
) -> Mapping[str, float]:
    """Recall at k both ways: is a partner among the k nearest? Names are the field's.

    Text i belongs to image `image_of_text[i]`, by default to image i. An image with several texts is found by any of
    them; each text looks for its one image. With `ranks` each of them ranks its share of the queries.
    """
    ranks = ranks or Ranks()
    images = torch.arange(len(image_features), device=image_features.device)
    of_text = images if image_of_text is None else image_of_text
    hits_image = _hits(text_features, image_features, of_text, images, ks, ranks)
    hits_text = _hits(image_features, text_features, images, of_text, ks, ranks)
    return {
        f"image_retrieval_recall@{k}": hits / max(1, len(of_text)) for k, hits in zip(ks, hits_image, strict=True)
    } | {f"text_retrieval_recall@{k}": hits / max(1, len(images)) for k, hits in zip(ks, hits_text, strict=True)}


def _hits(
    queries: Float[Tensor, "Q E"],
    candidates: Float[Tensor, "C E"],
    of_query: Int[Tensor, " Q"],
    of_candidate: Int[Tensor, " C"],
    ks: tuple[int, ...],
    ranks: Ranks,
) -> list[int]:
    """How many queries have a partner (a candidate of the same image) among the k first; ties as in `accuracy`."""
    hits = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    index = torch.arange(len(candidates), device=queries.device)
    for chunk in ranks.shard(-(-len(queries) // _ROWS)):
        rows = slice(chunk * _ROWS, (chunk + 1) * _ROWS)
        scores = queries[rows] @ candidates.T
        own = of_query[rows, None] == of_candidate
        best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
        first = index.where(own & (scores == best), len(candidates)).amin(dim=1, keepdim=True)
        ahead = ((scores > best) | ((scores == best) & (index < first))).sum(dim=1)
        hits += torch.stack([(ahead < k).sum() for k in ks])
    return ranks.sum(hits).tolist()
