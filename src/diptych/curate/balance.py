"""Which matched pairs stay, so that common queries do not drown the rare ones; three policies, no generator.

Every choice is a hash of (seed, key, query), so the same pairs stay in any order, partition or engine.

`cap`: one draw per pair, the same for all its queries. A pair stays if, for every query it contains, it is among that
query's t smallest draws. So no query keeps more than t pairs that contain it. The price: a pair of a rare query that
also contains a common one stays only as often as the common one allows. One draw per pair keeps that price low: a pair
of several queries stays with the smallest of their chances, not with the product.
`metaclip`: a pair stays with probability 1 - prod(1 - min(1, t / count)), one draw per (pair, query). Not a cap.
`assign`: a pair is charged to its rarest query (ties: the smaller id); each query then keeps the t smallest draws of
the pairs charged to it, so exactly min(t, charged) each. A common query may hold more than t pairs in all.

Draws that tie at the border are all dropped, so that repeated keys cannot break a cap.

Cutoffs need no shuffle. Counts come first; each query above t gets a histogram of its draws below a bound that almost
surely holds t + 1 of them; a second pass collects the values of the one bin that holds the border. Histograms add up,
collected values concatenate; memory is about `BINS` x 8 bytes a query above t, whatever the number of pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from diptych.errors import UsageError
from diptych.shards.order import hash_positions

Policy = Literal["cap", "metaclip", "assign"]

BINS = 256
"""Bins of each common query's histogram; the last one holds all draws above the bound."""

_NO_CUTOFF = -1.0


@dataclass(frozen=True, kw_only=True)
class Matches:
    """A block of pairs and their queries, flat: pair i has `queries[offsets[i]:offsets[i + 1]]`, none of them twice."""

    keys: NDArray[np.uint64]
    """A hash of each pair's key."""
    offsets: NDArray[np.int64]
    """Where each pair's queries begin; one longer than `keys`."""
    queries: NDArray[np.int64]
    """Query ids."""

    @property
    def pairs(self) -> NDArray[np.int64]:
        """The pair that each entry of `queries` belongs to."""
        return np.repeat(np.arange(len(self.keys)), np.diff(self.offsets))


Blocks = Callable[[], Iterable[Matches]]
"""Gives the blocks from the start, each time it is called."""


def hash_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Hash keys to the numbers that draws are made from."""
    return np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], dtype=np.uint64)


def _uniform(seed: int, numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (hash_positions(seed, numbers.view(np.int64)) >> np.uint64(11)).astype(np.float64) / 2.0**53


def pair_draws(seed: int, keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One draw in [0, 1) per pair."""
    return _uniform(seed, keys)


def match_draws(seed: int, matches: Matches) -> NDArray[np.float64]:
    """One draw in [0, 1) per (pair, query)."""
    mixed = hash_positions(seed, matches.queries, stream=1)
    return _uniform(seed, matches.keys[matches.pairs] ^ mixed)


def count_queries(blocks: Iterable[Matches], queries: int) -> NDArray[np.int64]:
    """Pairs of each query."""
    counts = np.zeros(queries, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block.queries, minlength=queries)
    return counts


def charge(matches: Matches, counts: NDArray[np.int64]) -> Matches:
    """Leave each pair its rarest query only; pairs without a query keep none."""
    order = np.lexsort((matches.queries, counts[matches.queries], matches.pairs))
    pairs, first = np.unique(matches.pairs, return_index=True)  # pairs is sorted, so lexsort keeps its runs in place
    sizes = np.zeros(len(matches.keys) + 1, dtype=np.int64)
    sizes[pairs + 1] = 1
    return Matches(keys=matches.keys, offsets=np.cumsum(sizes), queries=matches.queries[order[first]])


@dataclass(frozen=True, kw_only=True)
class _Common:
    """The queries above t, and how their draws are binned."""

    row: NDArray[np.int64]
    """Row of each query's histogram, -1 for a query of at most t pairs."""
    bound: NDArray[np.float64]
    """Per row: draws above it share the last bin."""

    def bins(self, block: Matches, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Row, bin and draw of each entry of a common query."""
        rows = self.row[block.queries]
        chosen = rows >= 0
        rows, draws = rows[chosen], pair_draws(seed, block.keys)[block.pairs[chosen]]
        places = np.minimum(draws / self.bound[rows] * (BINS - 1), BINS - 1).astype(np.int64)
        return rows, places, draws


def find_cutoffs(blocks: Blocks, counts: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.float64]:
    """The (limit + 1)th smallest draw of each query, -1 where it has no more than `limit` pairs; two passes."""
    common_ids = np.flatnonzero(counts > limit)
    row = np.full(len(counts), -1, dtype=np.int64)
    row[common_ids] = np.arange(len(common_ids))
    wanted = limit + 1 + 6 * np.sqrt(limit + 1) + 20
    common = _Common(row=row, bound=np.minimum(1.0, wanted / counts[common_ids]))
    histogram = np.zeros((len(common_ids), BINS), dtype=np.int64)
    for block in blocks():
        rows, places, _ = common.bins(block, seed)
        histogram += np.bincount(rows * BINS + places, minlength=histogram.size).reshape(histogram.shape)
    below = np.cumsum(histogram, axis=1)
    border = (below <= limit).sum(axis=1)  # the bin that holds the (limit + 1)th
    collected: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    for block in blocks():
        rows, places, draws = common.bins(block, seed)
        inside = places == border[rows]
        collected.append((rows[inside], draws[inside]))
    cutoffs = np.full(len(counts), _NO_CUTOFF)
    if len(common_ids):
        rows = np.concatenate([part[0] for part in collected])
        draws = np.concatenate([part[1] for part in collected])
        draws = draws[np.lexsort((draws, rows))]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(common_ids)))[:-1]])
        every = np.arange(len(common_ids))
        before = below[every, border] - histogram[every, border]
        cutoffs[common_ids] = draws[starts + limit - before]
    return cutoffs


def _under_all(block: Matches, cutoffs: NDArray[np.float64], seed: int) -> NDArray[np.bool_]:
    pairs, limits = block.pairs, cutoffs[block.queries]
    over = (limits != _NO_CUTOFF) & (pair_draws(seed, block.keys)[pairs] >= limits)
    kept = np.diff(block.offsets) > 0
    kept[pairs[over]] = False
    return kept


def balance(
    blocks: Blocks, queries: int, *, policy: Policy, limit: int = 20_000, seed: int = 0
) -> Iterator[NDArray[np.bool_]]:
    """For each block in turn, which of its pairs stay; pairs without a query never do."""
    if limit < 1:
        raise UsageError(f"limit is {limit}; allowed: 1 or more; the paper uses 20000")
    counts = count_queries(blocks(), queries)
    if policy == "cap":
        cutoffs = find_cutoffs(blocks, counts, limit, seed)
        for block in blocks():
            yield _under_all(block, cutoffs, seed)
    elif policy == "assign":
        charged: Blocks = lambda: (charge(block, counts) for block in blocks())  # noqa: E731
        cutoffs = find_cutoffs(charged, count_queries(charged(), queries), limit, seed)
        for block in charged():
            yield _under_all(block, cutoffs, seed)
    elif policy == "metaclip":
        chances = limit / np.maximum(counts, limit)
        for block in blocks():
            admitted = match_draws(seed, block) < chances[block.queries]
            kept = np.zeros(len(block.keys), dtype=np.bool_)
            kept[block.pairs[admitted]] = True
            yield kept
    else:
        raise UsageError(f"policy is {policy!r}; allowed: cap, metaclip, assign; choose one of them")
