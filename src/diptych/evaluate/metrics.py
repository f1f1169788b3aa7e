"""How good it is: accuracy with its interval, and retrieval."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.ranks import Ranks

_ROWS = 1024
"""Queries that are ranked at a time, so that no N x N matrix is held."""


def accuracy(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], top: int = 1) -> float:
    """Share of rows whose label is among the `top` highest scores, 0..1.

    Of equal scores the lower class index counts as higher, so that a constant classifier is not right by tie.
    """
    of_label = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > of_label) | ((scores == of_label) & (index < labels[:, None]))
    return (ahead.sum(dim=1) < top).double().mean().item()


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
    us = ranks or Ranks()
    images = torch.arange(len(image_features), device=image_features.device)
    of_text = images if image_of_text is None else image_of_text
    hits_image = _hits(text_features, image_features, of_text, images, ks, us)
    hits_text = _hits(image_features, text_features, images, of_text, ks, us)
    return {
        f"image_retrieval_recall@{k}": hits / max(1, len(of_text)) for k, hits in zip(ks, hits_image, strict=True)
    } | {f"text_retrieval_recall@{k}": hits / max(1, len(images)) for k, hits in zip(ks, hits_text, strict=True)}


def _hits(
    queries: Float[Tensor, "Q E"],
    candidates: Float[Tensor, "C E"],
    of_query: Int[Tensor, " Q"],
    of_candidate: Int[Tensor, " C"],
    ks: tuple[int, ...],
    us: Ranks,
) -> list[int]:
    """How many queries have a partner (a candidate of the same image) among the k first; ties as in `accuracy`."""
    hits = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    index = torch.arange(len(candidates), device=queries.device)
    for chunk in us.share(-(-len(queries) // _ROWS)):
        rows = slice(chunk * _ROWS, (chunk + 1) * _ROWS)
        scores = queries[rows] @ candidates.T
        own = of_query[rows, None] == of_candidate
        best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
        first = index.where(own & (scores == best), len(candidates)).amin(dim=1, keepdim=True)
        ahead = ((scores > best) | ((scores == best) & (index < first))).sum(dim=1)
        hits += torch.stack([(ahead < k).sum() for k in ks])
    return us.sum(hits).tolist()
