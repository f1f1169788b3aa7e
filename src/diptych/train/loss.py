"""The loss (paper section 2.3, the lower half of Figure 3), for any batch on any number of ranks.

The M x M matrix of similarities is never held. It is computed in tiles twice: once for the sums of each row and each
column (a streaming log-sum-exp), once more for the derivatives. A rank computes its own rows, pictures against the
texts of all ranks; sums over columns and derivatives of texts are then added over ranks. One process is the case of one
rank, so that there is one algorithm, and nothing to switch on to get it right.

The value is that of the whole batch on every rank, and the derivatives are this rank's part: added over ranks (not
averaged) they are those of one process with the whole batch. Everything is computed in float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diptych.model.device import widest_dtype
from diptych.ranks import Ranks

Loss = Callable[..., Tensor]

TILE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a tile: on a CPU 4 MiB that stay in its cache, on a GPU enough to fill it."""

ALONE = Ranks()


def clip_loss(
    image_features: Float[Tensor, "N E"],
    text_features: Float[Tensor, "N E"],
    logit_scale: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " N"] | None = None,
    ranks: Ranks = ALONE,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over the similarities of M pairs: each image picks its text, each text its image.

    Features are normalised, `logit_scale` is exp(t); N of the M pairs are this rank's. Pairs with the same number in
    `groups` (duplicate captions or pictures) are all right answers for each other, to equal parts; without it a pair
    has only itself.
    """
    return _TiledLoss.apply(_SoftmaxTiles, image_features, text_features, logit_scale, None, groups, ranks)


def siglip_loss(
    image_features: Float[Tensor, "N E"],
    text_features: Float[Tensor, "N E"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " N"] | None = None,
    ranks: Ranks = ALONE,
) -> Float[Tensor, ""]:
    """Sigmoid loss (Zhai et al. 2023, equation 1): every one of the M x M similarities is a yes or a no of its own.

    Summed over all of them and divided by M. Arguments as in `clip_loss`; pairs of one group are all a yes.
    """
    return _TiledLoss.apply(_SigmoidTiles, image_features, text_features, logit_scale, logit_bias, groups, ranks)


def initial_logit_bias(batch_size: int) -> float:
    """log(p / (1 - p)) for p = 1 / batch_size: an untrained model says yes as often as that is right."""
    return -math.log(max(1, batch_size - 1))


class Targets(ABC):
    """Which columns are right for which rows, and how much of the answer each is."""

    @abstractmethod
    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "R C"] | None:
        """Target weights of a tile; None if nothing in it is right. Every row of the whole adds up to 1."""


@dataclass(frozen=True)
class Diagonal(Targets):
    """Each pair has itself. This rank's row i is column `offset + i`."""

    offset: int
    like: Tensor

    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "R C"] | None:
        first, last = rows.start + self.offset, rows.stop + self.offset
        if last <= columns.start or columns.stop <= first:
            return None
        row = torch.arange(first, last, device=self.like.device)
        return (row[:, None] == torch.arange(columns.start, columns.stop, device=row.device)).to(self.like.dtype)


@dataclass(frozen=True)
class SameGroup(Targets):
    """All pairs of a group have each other, to equal parts."""

    of_rows: Int[Tensor, " N"]
    of_columns: Int[Tensor, " M"]
    size: Int[Tensor, " M"]
    """Pairs in the group of each column."""

    @classmethod
    def build(cls, of_rows: Int[Tensor, " N"], of_columns: Int[Tensor, " M"]) -> "SameGroup":
        """Count the groups."""
        _, group, sizes = of_columns.unique(return_inverse=True, return_counts=True)
        return cls(of_rows, of_columns, sizes[group])

    def weights(self, rows: slice, columns: slice) -> Float[Tensor, "R C"] | None:
        same = self.of_rows[rows, None] == self.of_columns[None, columns]
        return same / self.size[columns]


class _TiledLoss(torch.autograd.Function):
    """Features in, loss out; `tiles` says what a tile adds to the loss and to the derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: "type[_SoftmaxTiles | _SigmoidTiles]",
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        groups: Tensor | None,
        ranks: Ranks,
    ) -> Tensor:
        counts = ranks.counts(len(image_features))
        x, y = image_features.float(), ranks.gather(text_features).float()
        if groups is None:
            targets: Targets = Diagonal(sum(counts[: ranks.rank]), x)
        else:
            targets = SameGroup.build(groups, ranks.gather(groups))
        bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
        tiles = kind(logit_scale.float(), bias.float(), targets, ranks, len(x), len(y), x.device)
        for rows, columns in tiles.each():
            tiles.see(rows, columns, _logits(x[rows], y[columns], tiles))
        loss = tiles.finish()
        ctx.tiles, ctx.counts, ctx.has_bias = tiles, counts, logit_bias is not None
        ctx.save_for_backward(image_features, text_features if ranks.world_size == 1 else y.to(text_features.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        tiles: _SoftmaxTiles | _SigmoidTiles = ctx.tiles
        image_features, text_features = ctx.saved_tensors
        x, y = image_features.float(), text_features.float()
        d_image, d_text = torch.zeros_like(x), torch.zeros_like(y)
        d_scale, d_bias = x.new_zeros((), dtype=tiles.wide), x.new_zeros((), dtype=tiles.wide)
        for rows, columns in tiles.each():
            logits = _logits(x[rows], y[columns], tiles)
            slope = tiles.slope(rows, columns, logits)  # of the loss by each logit
            d_image[rows].addmm_(slope, y[columns])
            d_text[columns].addmm_(slope.T, x[rows])
            d_scale += logits.sub_(tiles.bias).mul_(slope).sum(dtype=tiles.wide)
            d_bias += slope.sum(dtype=tiles.wide)
        by_loss = outputs[0].float()
        d_scale = (d_scale * by_loss / tiles.scale).float()
        d_image.mul_(tiles.scale * by_loss)
        d_text = tiles.ranks.reduce_scatter(d_text.mul_(tiles.scale * by_loss), ctx.counts)
        return (
            None,
            d_image.to(image_features.dtype),
            d_text.to(text_features.dtype),
            d_scale,
            (d_bias * by_loss).float() if ctx.has_bias else None,
            None,
            None,
        )


def _logits(x: Float[Tensor, "R E"], y: Float[Tensor, "C E"], tiles: "_Tiles") -> Float[Tensor, "R C"]:
    with torch.autocast(x.device.type, enabled=False):
        return (x @ y.T).mul_(tiles.scale).add_(tiles.bias)


@dataclass
class _Tiles:
    """N rows by M columns, cut into tiles."""

    scale: Tensor
    bias: Tensor
    targets: Targets
    ranks: Ranks
    n: int
    m: int
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """What many numbers are added in."""
        return widest_dtype(self.device)

    def each(self) -> Iterator[tuple[slice, slice]]:
        """Every tile, row by row."""
        side = TILE.get(self.device.type, TILE["cuda"])
        for top in range(0, self.n, side):
            for left in range(0, self.m, side):
                yield slice(top, min(top + side, self.n)), slice(left, min(left + side, self.m))


@dataclass
class _SoftmaxTiles(_Tiles):
    """Cross-entropy along the rows and along the columns."""

    def __post_init__(self) -> None:
        self.rows = _LogSumExp(self.n, self.device)
        self.columns = _LogSumExp(self.m, self.device)
        self.right = torch.zeros((), dtype=self.wide, device=self.device)

    def see(self, rows: slice, columns: slice, logits: Tensor) -> None:
        """Add a tile to the sums. What is right is taken off on the way, so that small losses keep their digits."""
        weights = self.targets.weights(rows, columns)
        if weights is not None:
            self.right += (weights * logits).sum(dtype=self.wide)
        self.rows.add(rows, logits, dim=1)
        self.columns.add(columns, logits, dim=0)

    def finish(self) -> Tensor:
        """The loss; the columns' sums are completed from all ranks."""
        if self.ranks.world_size > 1:
            every = self.ranks.gather(self.columns.value()[None])  # [ranks, M]
            self.columns.set(every.logsumexp(dim=0))
        of_rows = self.rows.value().sum(dtype=self.wide)
        of_columns = self.columns.value().sum(dtype=self.wide)  # the same on every rank
        mine = self.ranks.sum(torch.stack([of_rows, self.right]))
        return ((mine[0] + of_columns - 2 * mine[1]) / (2 * self.m)).float()

    def slope(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        """Both softmaxes less what is right, over 2 M."""
        slope = (logits - self.rows.value()[rows, None]).exp_()
        slope += (logits - self.columns.value()[columns]).exp_()
        weights = self.targets.weights(rows, columns)
        if weights is not None:
            slope.sub_(weights, alpha=2)
        return slope.div_(2 * self.m)


@dataclass
class _SigmoidTiles(_Tiles):
    """One logistic regression for every similarity."""

    def __post_init__(self) -> None:
        self.total = torch.zeros((), dtype=self.wide, device=self.device)

    def see(self, rows: slice, columns: slice, logits: Tensor) -> None:
        """Add a tile to the sum."""
        yes = self._yes(rows, columns)
        signed = logits if yes is None else torch.where(yes, -logits, logits)
        self.total += F.softplus(signed).sum(dtype=self.wide)

    def finish(self) -> Tensor:
        """The loss."""
        return (self.ranks.sum(self.total) / self.m).float()

    def slope(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        """The probability of the wrong answer, signed, over M."""
        yes = self._yes(rows, columns)
        slope = logits.sigmoid() if yes is None else torch.where(yes, -(-logits).sigmoid(), logits.sigmoid())
        return slope.div_(self.m)

    def _yes(self, rows: slice, columns: slice) -> Tensor | None:
        weights = self.targets.weights(rows, columns)
        return None if weights is None else weights > 0


class _LogSumExp:
    """log(sum(exp(x))) of many rows, of which ever more is seen."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.largest = torch.full((count,), -torch.inf, device=device)
        self.sums = torch.zeros(count, device=device)

    def add(self, part: slice, logits: Tensor, dim: int) -> None:
        """More columns (`dim` 1) of some rows, or more rows (`dim` 0) of some columns."""
        before = self.largest[part]
        largest = torch.maximum(before, logits.amax(dim))
        self.sums[part] = self.sums[part] * (before - largest).exp() + (logits - largest.unsqueeze(dim)).exp_().sum(dim)
        self.largest[part] = largest

    def value(self) -> Tensor:
        """The logarithms."""
        return self.largest + self.sums.log()

    def set(self, value: Tensor) -> None:
        """Replace them by what is known from elsewhere."""
        self.largest, self.sums = value, torch.ones_like(value)
