"""The order of samples: arithmetic, not state.

`EpochOrder(...)[position]` says which row of which source stands at a position of an epoch. It is a pure function of
(dataset hashes, seed, epoch), so that any worker, any rank and any resumed run can ask for any position.

Inside a source, shards are permuted, put into blocks of `BLOCK_SHARDS`, and samples are permuted inside a block: a
reader needs no more than one block of shards at hand. Permutations come from sorting a hash of our own, since the
streams of library generators may change between versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

BLOCK_SHARDS = 64
"""Shards that are mixed with each other; 64,000 samples at our writer's 1,000 a shard."""

MIX_SAMPLES = 65536
"""Positions among which several sources are interleaved at random; over a run of that length the shares are exact."""

_U64 = np.uint64


def hash_positions(seed: int, positions: NDArray[np.int64], stream: int = 0) -> NDArray[np.uint64]:
    """Hash (seed, stream, position) to 64 well-mixed bits each (splitmix64): randomness without a generator."""
    with np.errstate(over="ignore"):
        x = positions.astype(_U64) + _U64(seed & 0xFFFFFFFFFFFFFFFF) * _U64(0x9E3779B97F4A7C15)
        return mix(x + _U64(stream) * _U64(0xD1B54A32D192ED03))


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash numbers to 64 well-mixed bits each, one to one: a step of splitmix64."""
    x = values + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def uniforms(seed: int, positions: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each position; float64 [positions, count]."""
    columns = [hash_positions(seed, positions, stream) for stream in range(count)]
    return np.stack(columns, axis=1).astype(np.float64) / 2.0**64


def derive_seed(*parts: object) -> int:
    """Fold anything printable into a 64-bit seed."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


def permutation(size: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on the seed alone."""
    return np.argsort(hash_positions(seed, np.arange(size, dtype=np.int64)), kind="stable")


class SourceOrder:
    """The endless order of one source: its epochs one after the other, each a fresh permutation."""

    def __init__(self, sizes: NDArray[np.int64], content_hash: str, seed: int) -> None:
        self.sizes = sizes
        self.samples = int(sizes.sum())
        self._first_row = np.concatenate([[0], np.cumsum(sizes)])  # of each shard, in file order
        self._seed = derive_seed("order", content_hash, seed)
        self._plan = lru_cache(maxsize=4)(self._build_plan)
        self._block = lru_cache(maxsize=8)(self._build_block)

    def __getitem__(self, position: int) -> int:
        """The row (in file order over all shards) at a position of the endless order."""
        epoch, offset = divmod(position, self.samples)
        _, block_starts = self._plan(epoch)
        block = int(np.searchsorted(block_starts, offset, side="right")) - 1
        return int(self._block(epoch, block)[offset - block_starts[block]])

    def locate(self, row: int) -> tuple[int, int]:
        """Row over all shards -> (shard, row in the shard)."""
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return shard, row - int(self._first_row[shard])

    def shards_from(self, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shards of the block at a position of the endless order, and those of the block behind it."""
        epoch, offset = divmod(position, self.samples)
        _, block_starts = self._plan(epoch)
        block = int(np.searchsorted(block_starts, offset, side="right")) - 1
        following = (epoch, block + 1) if block + 1 < len(block_starts) else (epoch + 1, 0)
        return self._shards_of_block(epoch, block), self._shards_of_block(*following)

    def _shards_of_block(self, epoch: int, block: int) -> tuple[int, ...]:
        shards, _ = self._plan(epoch)
        return tuple(shards[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS].tolist())

    def _build_plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the shards in an epoch, and the position at which each block of them starts."""
        shards = permutation(len(self.sizes), derive_seed(self._seed, epoch, "shards"))
        ends = np.cumsum(self.sizes[shards])
        return shards, np.concatenate([[0], ends[BLOCK_SHARDS - 1 : -1 : BLOCK_SHARDS]])

    def _build_block(self, epoch: int, block: int) -> NDArray[np.int64]:
        """The rows of one block, permuted."""
        shards, _ = self._plan(epoch)
        chosen = shards[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        rows = np.concatenate([np.arange(int(self._first_row[s]), int(self._first_row[s + 1])) for s in chosen])
        return rows[permutation(len(rows), derive_seed(self._seed, epoch, "block", block))]


@dataclass(frozen=True)
class Place:
    """Where a sample lies."""

    source: int
    row: int
    """In file order over all shards of the source."""
    position: int
    """In the endless order of the source."""


class EpochOrder:
    """Several sources as one: each is seen `weight` times an epoch (0.25: a quarter, the next quarter next time).

    With one source of weight 1 this is that source's order.
    """

    def __init__(self, sources: Sequence[SourceOrder], weights: Sequence[float], seed: int) -> None:
        self.sources = sources
        self.quotas = [round(weight * source.samples) for source, weight in zip(sources, weights, strict=True)]
        self.samples = sum(self.quotas)
        self._seed = derive_seed("mix", seed, *self.quotas)
        self._chunks = max(1, -(-self.samples // MIX_SAMPLES))
        self._mix = lru_cache(maxsize=4)(self._build_mix)

    def place(self, epoch: int, position: int) -> Place:
        """What stands at a position of an epoch."""
        if len(self.sources) == 1:
            position += epoch * self.samples
            return Place(0, self.sources[0][position], position)
        chunk = position * self._chunks // self.samples
        while self._start(chunk) > position:
            chunk -= 1
        while self._start(chunk + 1) <= position:
            chunk += 1
        source, rank = self._mix(epoch, chunk)
        offset = position - self._start(chunk)
        chosen = int(source[offset])
        taken = epoch * self.quotas[chosen] + self._share(chosen, chunk) + int(rank[offset])
        return Place(chosen, self.sources[chosen][taken], taken)

    def _share(self, source: int, chunk: int) -> int:
        """How many samples of a source stand before a chunk of the epoch."""
        return chunk * self.quotas[source] // self._chunks

    def _start(self, chunk: int) -> int:
        return sum(self._share(source, chunk) for source in range(len(self.sources)))

    def _build_mix(self, epoch: int, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position of a chunk: its source, and how many of that source came before it in the chunk."""
        counts = [self._share(s, chunk + 1) - self._share(s, chunk) for s in range(len(self.sources))]
        source = np.repeat(np.arange(len(counts)), counts)
        source = source[permutation(len(source), derive_seed(self._seed, epoch, chunk))]
        rank = np.zeros(len(source), dtype=np.int64)
        for s in range(len(counts)):
            mine = source == s
            rank[mine] = np.arange(int(mine.sum()))
        return source, rank
