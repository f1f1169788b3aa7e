"""Copies of pictures told from other pictures: recall at a precision, with views and with whole pictures only.

    python benchmarks/copies.py          (make bench NAME=copies; about a minute)

Two sets: OpenMoji's drawings, rendered (many resemble each other: the hard case), and pieces of scikit-learn's two
photographs. Each picture is changed in the ways of `diptych.curate.images.threshold.CHANGES`; the threshold is the
distance with a precision of at least 0.99 among these copies and all pairs of different pictures.
"""

import io
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from diptych.curate.images.threshold import CHANGES, Curve, hash_views, measure_curve
from harness import report

PRECISION = 0.99


def main() -> None:
    """Measure both sets."""
    rows = []
    for name, pictures in {"drawings": drawings(300), "photographs": photographs()}.items():
        curve = measure_curve(pictures)
        print_curve(name, curve, len(pictures))
        rows += compare(name, pictures, curve)
    rows += speed(photographs()[:50])
    report("copies", rows)


def drawings(count: int) -> list[Image.Image]:
    """Coloured drawings, 160 pixels; what looks the same to the hash of the whole is taken once."""
    import resvg_py
    from recipes.icons import _iter_openmoji

    pictures, seen = [], set()
    icons = list(_iter_openmoji())
    for icon in icons[:: max(1, len(icons) // (2 * count))]:
        png = bytes(resvg_py.svg_to_bytes(svg_string=icon.svg, width=160, height=160))
        layer = Image.open(io.BytesIO(png)).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        picture = Image.alpha_composite(white, layer).convert("RGB")
        whole = int(hash_views(picture)[0])
        if whole not in seen:
            seen.add(whole)
            pictures.append(picture)
    return list(islice(pictures, count))


def photographs() -> list[Image.Image]:
    """Pieces of 107 x 107 pixels that share none, twice as large."""
    pieces = []
    for pixels in load_sample_images().images:
        whole = Image.fromarray(pixels)
        for left in range(0, whole.width - 106, 107):
            for top in range(0, whole.height - 106, 107):
                piece = whole.crop((left, top, left + 107, top + 107))
                if np.asarray(piece.convert("L")).std() > 8:  # sky alone is no picture
                    pieces.append(piece.resize((214, 214), Image.Resampling.BICUBIC))
    return pieces


def print_curve(name: str, curve: Curve, pictures: int) -> None:
    """The curve, and what the threshold finds of each change."""
    place = curve.choose(PRECISION)
    print(f"{name}: {pictures} pictures, {curve.copies:,} copies, {curve.others:,} pairs of others; threshold {place}")
    for distance in range(13):
        print(f"  {distance:2d}  recall {curve.recall[distance]:.3f}  precision {curve.precision[distance]:.4f}")
    print("  " + ", ".join(f"{change} {found[place]:.2f}" for change, found in curve.recall_by_change.items()))


def compare(name: str, pictures: list[Image.Image], curve: Curve) -> list[dict[str, Any]]:
    """Views beside the hash of the whole alone, each at its own threshold."""
    rng = np.random.default_rng(0)
    whole = np.array([hash_views(picture)[0] for picture in pictures])
    same = whole[:, None] == whole[None]
    found, false = np.zeros(21), np.zeros(21)
    for change in CHANGES.values():
        changed = np.array([hash_views(change(picture, rng))[0] for picture in pictures])
        apart = np.bitwise_count(whole[:, None] ^ changed[None])
        found += [(np.diag(apart) <= distance).sum() for distance in range(21)]
        false += [(apart[~same] <= distance).sum() for distance in range(21)]
    precise = found / np.maximum(found + false, 1) >= PRECISION
    place = max(0, int(np.logical_and.accumulate(precise).sum()) - 1)
    ours, peer = float(curve.recall[curve.choose(PRECISION)]), float(found[place] / curve.copies)
    return [
        {
            "case": f"copies of {name} found at precision {PRECISION}",
            "ours": ours,
            "peer": peer,
            "peer_name": "whole picture only",
            "unit": "share",
            "ratio": ours / max(peer, 1e-9),
        }
    ]


def speed(pictures: list[Image.Image]) -> list[dict[str, Any]]:
    """Hashing, decoding included, one core."""
    from diptych.curate.images.prepare import hash_picture
    from diptych.curate.images.threshold import hash_encoded

    with tempfile.TemporaryDirectory() as folder:
        encoded = []
        for number, picture in enumerate(pictures):
            path = Path(folder) / f"{number}.jpg"
            picture.resize((512, 512)).save(path, quality=90)
            encoded.append(path.read_bytes())
    took = []
    for function in (hash_encoded, hash_picture):
        began = time.perf_counter()
        for data in encoded:
            function(data)
        took.append(len(encoded) / (time.perf_counter() - began))
    return [
        {
            "case": "pictures of 512 x 512 hashed a second",
            "ours": took[0],
            "peer": took[1],
            "peer_name": "whole picture only",
            "unit": "1/s",
            "ratio": took[0] / took[1],
        }
    ]


if __name__ == "__main__":
    main()
