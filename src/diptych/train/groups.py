"""Which pairs of a batch are right answers for each other, as numbers: equal number, equal group."""

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

from diptych.ranks import Ranks
from diptych.shards.loader import Batch
from diptych.train.config import Positives


def group_pairs(batch: Batch, positives: Positives, ranks: Ranks, device: torch.device) -> Int[Tensor, " N"] | None:
    """A number for each pair of this rank; None if a pair has only itself.

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
