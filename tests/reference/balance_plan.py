"""Balancing of blocks that are all at hand: what the stages of `curate.balance` do part by part, in one process."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from diptych.curate.balance.config import Policy
from diptych.curate.balance.policies import BINS, Common, Matches, Plan, charge

Blocks = Callable[[], Iterable[Matches]]
"""Gives the blocks from the start, each time it is called."""


def find_cutoffs(blocks: Blocks, counts: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.float64]:
    """Cutoffs of all queries, in two passes over the blocks."""
    common = Common.build(counts, limit, seed)
    histogram = np.zeros((len(common.ids), BINS), dtype=np.int64)
    for block in blocks():
        np.add.at(histogram.reshape(-1), common.places(block), 1)
    border = common.border(histogram)
    parts = [common.collect(block, border) for block in blocks()]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(part[0] for part in parts)])
    draws = np.concatenate([np.zeros(0), *(part[1] for part in parts)])
    return common.cutoffs(histogram, rows, draws)


def build_plan(blocks: Blocks, queries: int, *, policy: Policy, limit: int = 20_000, seed: int = 0) -> Plan:
    """Look at all blocks, as often as the policy needs: metaclip 1, cap 3, assign 4 times."""
    counts = count_queries(blocks(), queries)
    if policy == "metaclip":
        cutoffs = np.zeros(0)
    elif policy == "cap":
        cutoffs = find_cutoffs(blocks, counts, limit, seed)
    else:

        def charged() -> Iterator[Matches]:
            return (charge(block, counts) for block in blocks())

        cutoffs = find_cutoffs(charged, count_queries(charged(), queries), limit, seed)
    return Plan(policy=policy, limit=limit, seed=seed, counts=counts, cutoffs=cutoffs)


def count_queries(blocks: Iterable[Matches], queries: int) -> NDArray[np.int64]:
    """Pairs of each query."""
    counts = np.zeros(queries, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block.queries, minlength=queries)
    return counts
