"""How well copies of pictures are recognised: views, changes, and the precision-recall curve of a threshold.

A copy on the web is seldom the same bytes: it was saved again, made smaller, cut, mirrored, brightened. Perceptual
hashes bear the first kind. Against cuts and mirrors each picture is hashed in several `views`; two pictures are as far
apart as the nearest pair of a view of one and the whole of the other.

Where to draw the line is measured, not guessed: pictures of the evaluation set are changed in known ways (copies) and
held against all others (not copies). That gives recall and precision for each distance.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from diptych.curate.images.phash import Hashes, perceptual_hashes
from diptych.curate.images.prepare import decode_to_hash, to_hash

MAX_DISTANCE = 20
"""Where the curve ends: beyond it everything resembles everything."""
VIEWS = 13
MAX_PAIRS = 1 << 29
"""Pairs of decoys and other pictures that are looked at: half a minute."""
_BLOCK = 4096

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def hash_views(picture: Image.Image) -> Hashes:
    """Hashes of the whole picture, its mirror image, its middle, and nine cuts; [VIEWS], the whole first."""
    picture = to_hash(picture)
    wide, high = picture.size
    side = min(wide, high)
    middle = picture.crop(
        ((wide - side) // 2, (high - side) // 2, (wide - side) // 2 + side, (high - side) // 2 + side)
    )
    cuts = [_cut(picture, 0.9, x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)]
    return perceptual_hashes([picture, ImageOps.mirror(picture), middle, _cut(picture, 0.8, 0.5, 0.5), *cuts])


def hash_encoded(data: bytes) -> Hashes:
    """`hash_views` of encoded bytes; raises PictureError."""
    return hash_views(decode_to_hash(data))


def _cut(picture: Image.Image, share: float, left: float, top: float) -> Image.Image:
    wide, high = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    x, y = round((picture.width - wide) * left), round((picture.height - high) * top)
    return picture.crop((x, y, x + wide, y + high))


def _save_again(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=40)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def _cut_by(share: float) -> Change:
    return lambda picture, rng: _cut(picture, share, float(rng.random()), float(rng.random()))


def _resize_by(x: float, y: float) -> Change:
    return lambda picture, _: picture.resize((max(1, round(picture.width * x)), max(1, round(picture.height * y))))


CHANGES: dict[str, Change] = {
    "saved_again": _save_again,
    "half_size": _resize_by(0.5, 0.5),
    "squashed": _resize_by(0.75, 1.0),
    "cut_95": _cut_by(0.95),
    "cut_90": _cut_by(0.9),
    "cut_80": _cut_by(0.8),
    "square": lambda picture, _: ImageOps.fit(picture, (min(picture.size), min(picture.size))),
    "mirrored": lambda picture, _: ImageOps.mirror(picture),
    "brighter": lambda picture, _: ImageEnhance.Brightness(picture).enhance(1.25),
    "flatter": lambda picture, _: ImageEnhance.Contrast(picture).enhance(0.7),
    "grey": lambda picture, _: ImageOps.grayscale(picture).convert("RGB"),
    "blurred": lambda picture, _: picture.filter(ImageFilter.GaussianBlur(1.5)),
    "framed": lambda picture, _: ImageOps.expand(picture, max(1, min(picture.size) // 25), "white"),
    "turned": lambda picture, _: picture.rotate(2, Image.Resampling.BICUBIC, fillcolor="white"),
}
"""What people do to pictures; each makes a copy."""


@dataclass(frozen=True)
class Curve:
    """What each threshold finds, for distances 0..MAX_DISTANCE."""

    recall: NDArray[np.float64]
    """Share of the copies that are found."""
    precision: NDArray[np.float64]
    """Share of copies in what is found; 1 where nothing is found."""
    false_rate: NDArray[np.float64]
    """Share of the pairs of different pictures that are taken for copies."""
    recall_by_change: dict[str, NDArray[np.float64]]
    copies: int
    others: int

    def false_share(self, against: int, *, at_most: bool = False) -> NDArray[np.float64]:
        """For each distance, the share of pictures that would be taken for copies of one of `against` others, if none
        were. `at_most`: a rate that was seen so few times may be higher (Poisson, about 95 %)."""
        seen = self.false_rate * self.others
        more = 2 * np.sqrt(seen) + 3 if at_most else 0.0
        rate = np.minimum(1.0, (seen + more) / max(self.others, 1))
        return 1 - (1 - rate) ** against

    def choose(self, precision: float, against: int = 1) -> tuple[int, bool]:
        """The largest distance with this precision at it and below, and whether that is shown rather than estimated.

        The precision is that among the made copies; besides, no more than the rest of all pictures may be found by
        chance in a set of so many others. 0 if there is no such distance.
        """
        for at_most in (True, False):
            kept = (self.precision >= precision) & (self.false_share(against, at_most=at_most) <= 1 - precision)
            if enough := int(np.logical_and.accumulate(kept).sum()):
                return enough - 1, at_most
        return 0, False

    def with_decoys(self, decoys: Hashes, theirs: Iterable[Hashes]) -> "Curve":
        """The curve with what decoys find in the other set: turned pictures, of which it holds no copy."""
        false, pairs = np.zeros(MAX_DISTANCE + 1), 0
        for some in theirs:
            for start in range(0, len(some), _BLOCK):
                apart = distances(decoys, some[start : start + _BLOCK])
                false += np.histogram(apart, np.arange(MAX_DISTANCE + 2))[0]
                pairs += apart.size
            if pairs > MAX_PAIRS:
                break
        counts = self.false_rate * self.others + np.cumsum(false)
        return replace(self, false_rate=counts / max(self.others + pairs, 1), others=self.others + pairs)


def hash_decoys(pictures: Sequence[Image.Image]) -> Hashes:
    """Hashes of pictures turned by 90, 180 and 270 degrees: much like pictures, and copies of none."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return np.stack([hash_views(picture.transpose(turn)) for picture in pictures for turn in turns])


def distances(hashes: NDArray[np.uint64], against: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """[N, VIEWS], [M, VIEWS] -> how far apart each two are, [N, M]."""
    nearest = np.full((len(hashes), len(against)), 64, np.uint8)
    for view in range(hashes.shape[1]):
        np.minimum(nearest, np.bitwise_count(hashes[:, None, view] ^ against[None, :, 0]), out=nearest)
        np.minimum(nearest, np.bitwise_count(hashes[:, None, 0] ^ against[None, :, view]), out=nearest)
    return nearest


def measure_curve(pictures: Sequence[Image.Image], seed: int = 0) -> Curve:
    """Change every picture in every way and see which distances tell copies from others.

    Pictures that are the same already (no bit of their whole differs) are no pair of different pictures.
    """
    rng = np.random.default_rng(seed)
    originals = np.stack([hash_views(picture) for picture in pictures])
    same = originals[:, None, 0] == originals[None, :, 0]
    bins = np.arange(MAX_DISTANCE + 2)
    others = np.zeros(MAX_DISTANCE + 1)
    recall = {}
    for name, change in CHANGES.items():
        changed = np.stack([hash_views(change(picture, rng)) for picture in pictures])
        apart = distances(originals, changed)
        recall[name] = np.cumsum(np.histogram(np.diag(apart), bins)[0]) / len(pictures)
        others += np.histogram(apart[~same], bins)[0]
    found = np.stack(list(recall.values())).sum(0) * len(pictures)
    false = np.cumsum(others)
    copies, pairs = len(pictures) * len(CHANGES), int((~same).sum()) * len(CHANGES)
    total = found + false
    return Curve(
        recall=found / copies,
        precision=np.divide(found, total, out=np.ones_like(total), where=total > 0),
        false_rate=false / max(pairs, 1),
        recall_by_change=recall,
        copies=copies,
        others=pairs,
    )
