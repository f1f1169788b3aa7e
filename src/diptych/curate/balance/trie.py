"""Sequences of words, found in a stream of words by arrays alone.

The sequences form a trie whose edges (node, word) -> node lie in one open-addressing hash table. All places of a stream
go down the trie together, a word a step, and each step is a few array operations on the places that are still alive.
Most places end after one or two words, so the cost a word is small and does not grow with the number of sequences.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1
"""Number of a word that no sequence holds; also stands between texts, since nothing matches across it."""

_EMPTY = -1
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Edges:
    """A hash table from non-negative keys to numbers, built once; linear probing, at most half full."""

    def __init__(self, keys: NDArray[np.int64], values: NDArray[np.int32]) -> None:
        bits = max(1, int(2 * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._keys = np.full(1 << bits, _EMPTY, dtype=np.int64)
        self._values = np.zeros(1 << bits, dtype=np.int32)
        waiting, slots = np.arange(len(keys)), self._slots(keys)
        while len(waiting):
            free = np.flatnonzero(self._keys[slots] == _EMPTY)
            _, first = np.unique(slots[free], return_index=True)  # of those that want one slot, one gets it
            placed = free[first]
            self._keys[slots[placed]] = keys[waiting[placed]]
            self._values[slots[placed]] = values[waiting[placed]]
            waiting, slots = np.delete(waiting, placed), np.delete(slots, placed)
            slots = (slots + 1) & self._mask

    def _slots(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        with np.errstate(over="ignore"):
            return ((keys.view(np.uint64) * _MIX) >> self._shift).view(np.int64)

    def find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Which of the keys are in the table (their places in `keys`, ascending), and their values."""
        slots = self._slots(keys)
        there = self._keys[slots]
        found = there == keys
        unsure = np.flatnonzero(~found & (there != _EMPTY))
        while len(unsure):
            slots[unsure] = (slots[unsure] + 1) & self._mask
            there = self._keys[slots[unsure]]
            hit = there == keys[unsure]
            found[unsure[hit]] = True
            unsure = unsure[~hit & (there != _EMPTY)]
        places = np.flatnonzero(found)
        return places, self._values[slots[places]]


class WordTrie:
    """Finds every one of many word sequences in a stream of words."""

    def __init__(self, sequences: Iterable[Sequence[str]]) -> None:
        """Sequence i is found as number i; an empty one is never found."""
        self.words: dict[str, int] = {}
        number = self.words.setdefault
        flat: list[int] = []
        lengths: list[int] = []
        for sequence in sequences:
            flat.extend([number(word, len(self.words)) for word in sequence])
            lengths.append(len(sequence))
        self.sequences = len(lengths)
        ends = self._build(np.array(flat, dtype=np.int64), np.array(lengths, dtype=np.int64))
        order = np.argsort(ends, kind="stable")
        self._numbers = order[ends[order] >= 0]  # sequences by the node they end in; equal ones share it
        self._size = np.bincount(ends[self._numbers], minlength=self._nodes)
        self._first = np.cumsum(self._size) - self._size

    def _build(self, flat: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number the nodes (those of one word as the words are) and lay the edges; the node each sequence ends in."""
        starts = np.cumsum(lengths) - lengths
        self._nodes = len(self.words)
        nodes = np.full(len(lengths), -1, dtype=np.int64)
        alive = np.flatnonzero(lengths > 0)
        nodes[alive] = flat[starts[alive]]
        keys: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        depth = 1
        while len(alive := alive[lengths[alive] > depth]):
            edges, edge = np.unique(nodes[alive] * len(self.words) + flat[starts[alive] + depth], return_inverse=True)
            nodes[alive] = self._nodes + edge
            self._nodes += len(edges)
            keys.append(edges)
            depth += 1
        self._edges = Edges(np.concatenate(keys), np.arange(len(self.words), self._nodes, dtype=np.int32))
        parents = np.concatenate(keys) // max(1, len(self.words))
        self._inner = np.bincount(parents, minlength=self._nodes) > 0
        return nodes

    def find(self, words: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All (place, sequence number) such that the sequence begins at that place; `words` ends with UNKNOWN."""
        places = np.flatnonzero(words != UNKNOWN)
        nodes = words[places]
        begin, number = [], []
        depth = 0
        while len(places):
            sizes = self._size[nodes]
            ending = np.flatnonzero(sizes)
            sizes, first = sizes[ending], self._first[nodes[ending]]
            begin.append(np.repeat(places[ending], sizes))
            shift = np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
            number.append(self._numbers[shift + np.arange(len(shift))])
            depth += 1
            inner = np.flatnonzero(self._inner[nodes])
            places, nodes = places[inner], nodes[inner]
            following = words[places + depth]
            known = np.flatnonzero(following != UNKNOWN)
            places = places[known]
            held, nodes = self._edges.find(nodes[known] * len(self.words) + following[known])
            places = places[held]
        if not begin:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(begin), np.concatenate(number)
