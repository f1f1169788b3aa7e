"""Finding pictures that are the same to the eye, so that what is tested was not trained on.

A 64-bit perceptual hash (pHash: the signs of the low frequencies of a 32 x 32 grey thumbnail) and locality-sensitive
bands: hashes that differ in at most `BANDS - 1` bits agree in at least one of the bands, so only those are compared.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import UsageError

THUMBNAIL = 32
"""Side of the picture that is hashed, pixels."""
LOW = 8
"""Low frequencies kept in each direction: 8 x 8 = 64 bits."""
BANDS = 8
"""Pieces of 8 bits; finds every pair of hashes at a distance of up to 7 bits."""


def perceptual_hashes(pictures: Iterable[Image.Image]) -> NDArray[np.uint64]:
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


def near_duplicates(
    hashes: NDArray[np.uint64], against: NDArray[np.uint64], max_distance: int = 3
) -> list[tuple[int, int]]:
    """All (i, j) for which hashes[i] and against[j] differ in at most `max_distance` bits."""
    if not 0 <= max_distance < BANDS:
        raise UsageError(f"max_distance {max_distance} must be 0..{BANDS - 1}: more would be missed by the bands")
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for j, bands in enumerate(_bands(against)):
        for band in enumerate(bands):
            buckets[band].append(j)
    found = set()
    for i, bands in enumerate(_bands(hashes)):
        candidates = {j for band in enumerate(bands) for j in buckets.get(band, ())}
        found.update((i, j) for j in candidates if int(hashes[i] ^ against[j]).bit_count() <= max_distance)
    return sorted(found)


def _bands(hashes: NDArray[np.uint64]) -> list[list[int]]:
    return hashes.astype(">u8").view(np.uint8).reshape(-1, BANDS).tolist()


def _cosine_basis() -> NDArray[np.float64]:
    """The first LOW rows of the DCT-II matrix of size THUMBNAIL, without its scaling."""
    frequency, place = np.arange(LOW)[:, None], np.arange(THUMBNAIL)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * THUMBNAIL))
