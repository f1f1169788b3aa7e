"""The gradient of one global batch, exact whatever fits into memory at once.

A batch that fits goes through in one pass. A larger one goes through twice in micro-batches (gradient caching, Gao et
al. 2021): first without derivatives, to have all features; then the loss and its derivatives by the features; then
each micro-batch again, its features' derivatives pushed back into the weights. The result is that of one pass:

* random numbers are drawn anew from the position of a micro-batch in the run, so both passes draw the same;
* `logit_scale` and `logit_bias` take part once, with the last micro-batch;
* running statistics of BatchNorm change in the first pass alone. (A micro-batch is normalised by its own statistics, as
  a rank's batch is: with BatchNorm, and only with it, the size of the micro-batch is part of the model.)
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.image import Preprocess
from diptych.model.clip import CLIP, CLIPOutput, Output
from diptych.model.config import ViTConfig
from diptych.model.inference.precision import has_fast_bfloat16
from diptych.ranks import Ranks
from diptych.shards.loader import Batch
from diptych.shards.order import derive_seed, hash_positions
from diptych.train.config import Positives, RunConfig
from diptych.train.loss import clip_loss, siglip_loss


def choose_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """The type of the towers' matrix products; `auto` asks the processor, not the clock, so it is the same again."""
    if run.precision == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if run.precision == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Let matrix products be computed in a type; float32 leaves them as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The gradient of one batch: `model` may be wrapped for many ranks, `plain` is the CLIP inside."""

    model: nn.Module
    plain: CLIP
    ranks: Ranks
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype
    """Type of the towers' matrix products."""
    seed: int
    patch_dropout: float = 0.0

    def gradients(self, batch: Batch, first: int, micro_batch_size: int, groups: Tensor | None = None) -> Tensor:
        """Add the gradients of this rank's batch to the weights; returns the loss of the global batch.

        `first` is the number of samples that the run saw before the first of this batch.
        """
        count = len(batch.image)
        if micro_batch_size >= count:
            output = self.forward(batch, slice(0, count), first)
            loss = self.loss(output, groups)
            if torch.isfinite(loss):
                loss.backward()
            return loss.detach()
        parts = [slice(start, min(start + micro_batch_size, count)) for start in range(0, count, micro_batch_size)]
        with torch.no_grad():
            cached = [self.forward(batch, part, first) for part in parts]
        joined = cached[0]._replace(  # the scale and the bias are equal in all
            image_features=torch.cat([output.image_features for output in cached]),
            text_features=torch.cat([output.text_features for output in cached]),
        )
        leaves = joined._make(tensor.detach().requires_grad_() for tensor in joined)
        loss = self.loss(leaves, groups)
        if torch.isfinite(loss):
            derivatives = torch.autograd.grad(loss, list(leaves))
            self._push_back(batch, first, parts, derivatives)
        return loss.detach()

    def loss(self, output: Output, groups: Tensor | None) -> Tensor:
        """The loss of the global batch, by this rank's features."""
        function = clip_loss if isinstance(output, CLIPOutput) else siglip_loss
        return function(*output, groups=groups, ranks=self.ranks)

    def _push_back(self, batch: Batch, first: int, parts: list[slice], derivatives: tuple[Tensor, ...]) -> None:
        with frozen_statistics(self.plain):
            for part in parts:
                is_last = part is parts[-1]
                with self._exchange(is_last):
                    output = self.forward(batch, part, first)
                    # A scalar's derivative is that of the whole batch: it counts once.
                    mine = [d[part] if d.ndim else (d if is_last else torch.zeros_like(d)) for d in derivatives]
                    pairs = [(o, d) for o, d in zip(output, mine, strict=True) if o.requires_grad]
                    torch.autograd.backward([o for o, _ in pairs], [d for _, d in pairs])

    def forward(self, batch: Batch, part: slice, first: int) -> Output:
        """Part of a batch through both towers."""
        torch.manual_seed(derive_seed("noise", self.seed, first + part.start))
        image = self.preprocess.normalize(batch.image[part].to(self.device, non_blocking=True))
        text = batch.text[part].to(self.device, non_blocking=True)
        stored = [
            None if features is None else features[part].to(self.device, non_blocking=True)
            for features in (batch.image_features, batch.text_features)
        ]
        with autocast(self.device, self.dtype):
            return self.model(image, text, self.draw_patches(first + part.start, len(image)), *stored)

    def draw_patches(self, first: int, count: int) -> Tensor | None:
        """Which patches of each picture are seen, int64 [count, kept]; None for all of them.

        A pure function of the picture's place in the run, so that no number of ranks and no micro-batch changes it.
        """
        vision = self.plain.config.vision
        if not self.patch_dropout or not isinstance(vision, ViTConfig):
            return None
        patches = vision.grid**2
        kept = max(1, round(patches * (1 - self.patch_dropout)))
        places = torch.arange(first * patches, (first + count) * patches).view(count, patches).numpy()
        order = hash_positions(derive_seed("patches", self.seed), places).argsort(axis=1)[:, :kept]
        return torch.from_numpy(order).to(self.device).sort(dim=1).values

    def _exchange(self, now: bool) -> AbstractContextManager[None]:
        """Gradients are added over ranks once, with the last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and not now:
            return self.model.no_sync()
        return nullcontext()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Running statistics come out as they went in."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def group_pairs(batch: Batch, positives: Positives, ranks: Ranks, device: torch.device) -> Int[Tensor, " N"] | None:
    """Number the groups of pairs that are right answers for each other; None if a pair has only itself.

    `caption` compares tokens, `image` the pictures' files, by a 64-bit hash. With `either` pairs that are linked
    through others are one group too: the first's picture equal to the second's, the second's caption to the third's.
    """
    if positives == "pair":
        return None
    hashes = [xxhash.xxh3_64_intdigest(row.numpy().tobytes()) for row in batch.text]
    captions, images = (
        torch.tensor([number - (1 << 63) for number in numbers], dtype=torch.int64, device=device)
        for numbers in (hashes, batch.pictures)
    )
    if positives != "either":
        return captions if positives == "caption" else images
    count = len(captions)
    links = [ranks.gather(numbers).unique(return_inverse=True)[1] for numbers in (captions, images)]
    group = torch.arange(len(links[0]), device=device)
    while True:
        before = group
        for link in links:  # each takes the smallest number among those it is linked to
            smallest = group.new_full((int(link.max()) + 1,), len(group)).scatter_reduce(0, link, group, "amin")
            group = smallest[link]
        if torch.equal(group, before):
            first = sum(ranks.counts(count)[: ranks.rank])
            return group[first : first + count]
