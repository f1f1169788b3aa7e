"""Finding pictures that are the same to the eye, so that what is tested was not trained on.

A 64-bit perceptual hash (pHash: the signs of the low frequencies of a 32 x 32 grey thumbnail). Hashes that differ in
few bits are found by bands: cut into `d + 1` pieces, two hashes that differ in at most d bits agree in one piece, so
only those are compared. From `BAND_LIMIT` bits on the pieces are too short to help, and all are compared with all.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import UsageError

THUMBNAIL = 32
"""Side of the picture that is hashed, pixels."""
LOW = 8
"""Low frequencies kept in each direction: 8 x 8 = 64 bits."""
BITS = 64
BAND_LIMIT = 7
"""Distances up to this are found by bands."""
_PAIRS = 1 << 24
"""Pairs compared at once."""

Hashes = NDArray[np.uint64]
Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]
"""i, j and the bits in which they differ."""


def perceptual_hashes(pictures: Iterable[Image.Image]) -> Hashes:
    """Hash pictures; those that look alike get hashes that differ in few bits."""
    thumbnails = [
        np.asarray(picture.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), dtype=np.float64)
        for picture in pictures
    ]
    if not thumbnails:
        return np.empty(0, dtype=np.uint64)
    basis = _cosine_basis()
    low = basis @ np.stack(thumbnails) @ basis.T  # [N, LOW, LOW] of the two-dimensional cosine transform
    low = low.reshape(len(low), LOW * LOW)
    median = np.median(low[:, 1:], axis=1, keepdims=True)  # the first is the mean brightness
    return np.packbits(low > median, axis=1).view(">u8").astype(np.uint64).ravel()


def near_duplicates(hashes: Hashes, against: Hashes, max_distance: int = 3) -> list[tuple[int, int]]:
    """All (i, j) for which hashes[i] and against[j] differ in at most `max_distance` bits, sorted."""
    i, j, _ = find_near(hashes, against, max_distance)
    return list(zip(i.tolist(), j.tolist(), strict=True))


def find_near(hashes: Hashes, against: Hashes, max_distance: int = 3) -> Found:
    """The same as arrays, with the distances; sorted by i, then j."""
    if not 0 <= max_distance < BITS:
        raise UsageError(f"max_distance {max_distance} must be 0..{BITS - 1}: two hashes have {BITS} bits")
    pieces = _by_bands if max_distance <= BAND_LIMIT else _by_all
    left, right, bits = [], [], []
    for i, j in pieces(hashes, against, max_distance):
        distance = np.bitwise_count(hashes[i] ^ against[j])
        near = distance <= max_distance
        left.append(i[near])
        right.append(j[near])
        bits.append(distance[near])
    if not left:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
    i, j, distance = np.concatenate(left), np.concatenate(right), np.concatenate(bits)
    _, first = np.unique(i * max(len(against), 1) + j, return_index=True)  # a pair may agree in several bands
    return i[first], j[first], distance[first]


def first_alike(hashes: Hashes, max_distance: int = 3) -> NDArray[np.int64]:
    """For each hash the first one that it is taken to be a copy of; itself, if it is the first of its kind.

    Only those that are the first of their kind have copies, so no chain of small steps joins what is not alike.
    """
    distinct, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    ordered, firsts = distinct[order], first[order]
    neighbours: defaultdict[int, list[int]] = defaultdict(list)
    for i, j, _ in zip(*map(np.ndarray.tolist, find_near(ordered, ordered, max_distance)), strict=True):
        if j < i:
            neighbours[i].append(j)
    kind = np.arange(len(ordered))
    for i in sorted(neighbours):
        kind[i] = next((j for j in neighbours[i] if kind[j] == j), i)
    return firsts[kind[rank[place]]]


def _by_all(hashes: Hashes, against: Hashes, max_distance: int) -> Iterator[tuple[NDArray, NDArray]]:
    rows = max(1, _PAIRS // max(len(against), 1))
    for start in range(0, len(hashes), rows):
        block = hashes[start : start + rows, None]
        i, j = np.nonzero(np.bitwise_count(block ^ against[None]) <= max_distance)
        yield i + start, j


def _by_bands(hashes: Hashes, against: Hashes, max_distance: int) -> Iterator[tuple[NDArray, NDArray]]:
    edges = np.linspace(0, BITS, max_distance + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mask = np.uint64((1 << (high - low)) - 1)
        mine, theirs = (hashes >> np.uint64(low)) & mask, (against >> np.uint64(low)) & mask
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        begin, end = np.searchsorted(theirs, mine, "left"), np.searchsorted(theirs, mine, "right")
        yield from _spread(begin, end, order)


def _spread(begin: NDArray, end: NDArray, order: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    """(i, order[begin[i]..end[i]]) of all i, in pieces that fit in memory."""
    total = np.concatenate([[0], np.cumsum(end - begin)])
    for start in range(0, int(total[-1]), _PAIRS):
        stop = min(start + _PAIRS, int(total[-1]))
        numbers = np.arange(start, stop)
        i = np.searchsorted(total, numbers, "right") - 1
        yield i, order[begin[i] + numbers - total[i]]


def _cosine_basis() -> NDArray[np.float64]:
    """The first LOW rows of the DCT-II matrix of size THUMBNAIL, without its scaling."""
    frequency, place = np.arange(LOW)[:, None], np.arange(THUMBNAIL)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * THUMBNAIL))
