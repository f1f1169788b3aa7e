"""Preprocessing beside openai/CLIP's and open_clip's transforms, bit for bit (tests/golden/make_preprocess.py)."""

import base64
import hashlib
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.image import Preprocess, open_picture

RECORD = json.loads(lzma.decompress((Path(__file__).parent / "fixtures" / "preprocess.json.xz").read_bytes()))
PICTURES = {kind: base64.b64decode(data) for kind, data in RECORD["pictures"].items()}


def ours(transform: str) -> Preprocess:
    match transform.split():
        case ["openai", size]:
            return Preprocess(image_size=int(size))
        case ["open_clip", interpolation, mode, size]:
            resize = {"shortest": "shorter_side", "squash": "squash"}[mode]
            return Preprocess(image_size=int(size), resize=resize, interpolation=interpolation)
    raise ValueError(transform)


@pytest.mark.parametrize("transform", RECORD["digests"])
def test_every_kind_of_picture_comes_out_bit_for_bit_as_theirs(transform):
    preprocess, expected = ours(transform), RECORD["digests"][transform]
    digests = {
        kind: hashlib.sha256(preprocess(open_picture(data)).contiguous().numpy().tobytes()).hexdigest()
        for kind, data in PICTURES.items()
    }
    assert [kind for kind in PICTURES if digests[kind] != expected[kind]] == []


def test_all_the_kinds_that_are_promised_are_compared():
    modes = {Image.open(io.BytesIO(data)).mode for data in PICTURES.values()}
    assert modes >= {"RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "F", "YCbCr", "LAB"}
    assert modes & {"I", "I;32S"}
    sizes = {Image.open(io.BytesIO(data)).size for data in PICTURES.values()}
    assert {(37, 53), (224, 224), (1, 300), (20, 20)} <= sizes
    assert Image.open(io.BytesIO(PICTURES["JPEG turned by EXIF"])).getexif()[0x0112] == 6
    assert Image.open(io.BytesIO(PICTURES["palette with a transparent colour"])).info["transparency"] == 3


def test_what_odd_pictures_get_is_what_the_table_says():
    """docs/checkpoints.md, "What each kind of picture gets"."""
    preprocess = Preprocess(image_size=32)

    def pixels(kind: str) -> np.ndarray:
        return preprocess.pixels(open_picture(PICTURES[kind])).astype(int)

    colours = preprocess.pixels(open_picture(PICTURES["rgba"]).convert("RGB")).astype(int)
    assert 0 < abs(pixels("rgba") - colours).max() < 20  # Pillow weighs by alpha while it resizes ...
    assert (pixels("palette") == pixels("palette with a transparent colour")).all()  # ... and drops it here
    assert (pixels("16-bit grey") >= 255).mean() > 0.99  # clipped, not scaled
    assert (pixels("JPEG turned by EXIF") == pixels("JPEG")).all()
    assert set(np.unique(pixels("black and white"))) <= {0, 255}  # resized by nearest neighbour
