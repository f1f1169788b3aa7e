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

Under `cap` most pairs of rare queries go: a pair stays with the smallest chance of its queries, and nearly every text
holds a common one ("red", "the"). That lies in the statement "at most t pairs contain a query" more than in this way of
choosing: whatever is chosen, the pairs that contain a common query are t in all, and rare queries share these places
with everything else that query meets. Filling in order (a pair stays if all its queries have room) leaves no place
empty and keeps about twice the pairs, and still few of the rare ones (benchmarks/balance.py compares both); but what it
decides on a pair depends on chains of other pairs, so it cannot be cut into parts and one more pair may turn many
others. Who wants rare queries whole takes `metaclip` or `assign`.

Cutoffs need no shuffle. Counts come first; each query above t gets a histogram of its draws below a bound that almost
surely holds t + 1 of them; a second pass collects the values of the one bin that holds the border. Histograms add up,
collected values concatenate; memory is about `BINS` x 8 bytes a query above t, whatever the number of pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from diptych.curate.balance.config import Policy
from diptych.shards.order import hash_positions

BINS = 256
"""Bins of each common query's histogram; the last one holds all draws above the bound."""

NO_CUTOFF = -1.0


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


def charge(matches: Matches, counts: NDArray[np.int64]) -> Matches:
    """Leave each pair its rarest query only; pairs without a query keep none."""
    order = np.lexsort((matches.queries, counts[matches.queries], matches.pairs))
    pairs, first = np.unique(matches.pairs, return_index=True)  # pairs is sorted, so lexsort keeps its runs in place
    sizes = np.zeros(len(matches.keys) + 1, dtype=np.int64)
    sizes[pairs + 1] = 1
    return Matches(keys=matches.keys, offsets=np.cumsum(sizes), queries=matches.queries[order[first]])


@dataclass(frozen=True, kw_only=True)
class Common:
    """The queries with more than `limit` pairs, and how their draws are binned on the way to their cutoffs."""

    limit: int
    seed: int
    ids: NDArray[np.int64]
    """These queries, ascending."""
    row: NDArray[np.int64]
    """Row of each query's histogram, -1 for a query of at most `limit` pairs."""
    bound: NDArray[np.float64]
    """Per row: draws above it share the last bin."""

    @classmethod
    def build(cls, counts: NDArray[np.int64], limit: int, seed: int) -> "Common":
        """Find them by the pairs of each query."""
        ids = np.flatnonzero(counts > limit)
        row = np.full(len(counts), -1, dtype=np.int64)
        row[ids] = np.arange(len(ids))
        wanted = limit + 1 + 6 * np.sqrt(limit + 1) + 20
        return cls(limit=limit, seed=seed, ids=ids, row=row, bound=np.minimum(1.0, wanted / counts[ids]))

    def _bins(self, block: Matches) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Row, bin and draw of each entry of a common query."""
        rows = self.row[block.queries]
        chosen = rows >= 0
        rows, draws = rows[chosen], pair_draws(self.seed, block.keys)[block.pairs[chosen]]
        places = np.minimum(draws / self.bound[rows] * (BINS - 1), BINS - 1).astype(np.int64)
        return rows, places, draws

    def places(self, block: Matches) -> NDArray[np.int64]:
        """Where each draw of a block is counted in the histogram of all rows, laid out flat."""
        rows, places, _ = self._bins(block)
        return rows * BINS + places

    def border(self, histogram: NDArray[np.int64]) -> NDArray[np.int64]:
        """Per row, the bin that holds the (limit + 1)th smallest draw."""
        return (np.cumsum(histogram, axis=1) <= self.limit).sum(axis=1)

    def collect(self, block: Matches, border: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows and draws of a block that lie in the border's bins; those of several blocks are put together."""
        rows, places, draws = self._bins(block)
        inside = places == border[rows]
        return rows[inside], draws[inside]

    def cutoffs(
        self, histogram: NDArray[np.int64], rows: NDArray[np.int64], draws: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The (limit + 1)th smallest draw of each query, NO_CUTOFF where it has no more than `limit` pairs."""
        cutoffs = np.full(len(self.row), NO_CUTOFF)
        if len(self.ids):
            border, every = self.border(histogram), np.arange(len(self.ids))
            draws = draws[np.lexsort((draws, rows))]
            sizes = np.bincount(rows, minlength=len(self.ids))
            before = np.cumsum(histogram, axis=1)[every, border] - histogram[every, border]
            cutoffs[self.ids] = draws[np.cumsum(sizes) - sizes + self.limit - before]
        return cutoffs


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of the pairs of a block."""

    kept: NDArray[np.bool_]
    query: NDArray[np.int64]
    """What the pair is charged to (assign), what admitted it (metaclip) or what came closest to refusing it (cap)."""
    draw: NDArray[np.float64]
    """The draw that decided."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the choice needs to know of the whole: small, whatever the number of pairs."""

    policy: Policy
    limit: int
    seed: int
    counts: NDArray[np.int64]
    """Pairs of each query."""
    cutoffs: NDArray[np.float64]
    """Cutoff of each query for cap and assign, else unused."""

    def judge(self, block: Matches) -> Verdict:
        """Say which pairs of a block stay; one without a query (query -1) never does."""
        if self.policy == "metaclip":
            draws = match_draws(self.seed, block)
            chances = self.limit / np.maximum(self.counts[block.queries], self.limit)
            return _decide(block, draws, draws / chances, 1.0)
        if self.policy == "assign":
            block = charge(block, self.counts)
        draws = pair_draws(self.seed, block.keys)[block.pairs]
        cutoffs = self.cutoffs[block.queries]
        # a draw below a cutoff stays, so the query with the smallest cutoff decides; without one it never refuses
        return _decide(block, draws, np.where(cutoffs == NO_CUTOFF, np.inf, cutoffs), None)


def _decide(block: Matches, draws: NDArray[np.float64], order: NDArray[np.float64], below: float | None) -> Verdict:
    """Each pair's deciding entry is the first in `order`; it stays if that is under `below`, or its draw under that."""
    pairs = block.pairs
    first = np.lexsort((block.queries, order, pairs))[block.offsets[:-1][np.diff(block.offsets) > 0]]
    owner = pairs[first]
    kept = np.zeros(len(block.keys), dtype=np.bool_)
    kept[owner] = order[first] < below if below is not None else draws[first] < order[first]
    query = np.full(len(block.keys), -1, dtype=np.int64)
    query[owner] = block.queries[first]
    draw = np.zeros(len(block.keys))
    draw[owner] = draws[first]
    return Verdict(kept=kept, query=query, draw=draw)
