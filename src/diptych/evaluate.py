"""How good it is: accuracy with its interval, and retrieval."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

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


def retrieval(
    image_features: Float[Tensor, "N E"], text_features: Float[Tensor, "N E"], ks: tuple[int, ...] = (1, 5, 10)
) -> Mapping[str, float]:
    """Recall at k both ways: is the partner of row i among the k nearest? Names are the field's."""
    image_ranks = _ranks(text_features, image_features)
    text_ranks = _ranks(image_features, text_features)
    return {f"image_retrieval_recall@{k}": (image_ranks < k).double().mean().item() for k in ks} | {
        f"text_retrieval_recall@{k}": (text_ranks < k).double().mean().item() for k in ks
    }


def _ranks(queries: Float[Tensor, "N E"], candidates: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
    """How many candidates stand before each query's partner; ties by index, as in `accuracy`."""
    ranks = []
    index = torch.arange(len(candidates), device=candidates.device)
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        own = index[start : start + len(scores), None]
        of_partner = scores.gather(1, own)
        ahead = (scores > of_partner) | ((scores == of_partner) & (index < own))
        ranks.append(ahead.sum(dim=1))
    return torch.cat(ranks) if ranks else index
