"""Encoded bytes become an image, or one of the reasons that are counted."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych.decode import FORMATS, REASONS, decode, open_header
from diptych.errors import PictureError
from samples import encode, noise


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing: a decompression bomb's beginning."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + ihdr
        + struct.pack(">I", zlib.crc32(ihdr))
        + struct.pack(">I", 999)
        + b"IDAT"
    )


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG that claims another size."""
    data = encode(noise((50, 50)))
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


UNUSABLE = [
    (b"", "empty"),
    (b"hello, I am text", "not_a_picture"),
    (encode(noise())[:400], "truncated"),
    (encode(noise((300, 300)))[:-2000], "truncated"),
    (encode(noise(), "PNG")[:200], "truncated"),
    (png_header(60_000, 60_000), "too_many_pixels"),
    (png_header(10_001, 10_000), "too_many_pixels"),
    (jpeg_header(60_000, 60_000), "too_many_pixels"),
    (jpeg_header(10_001, 10_000), "too_many_pixels"),
    (b"\xff\xd8\xff" + bytes(500), "not_a_picture"),
]


@pytest.mark.parametrize(("data", "reason"), UNUSABLE)
@pytest.mark.parametrize("formats", [FORMATS, ("JPEG", "PNG")])
@pytest.mark.parametrize("side", [None, 8])
def test_what_is_no_usable_picture_has_a_reason(data, reason, formats, side):
    with pytest.raises(PictureError) as caught:
        decode(data, formats=formats, side=side)
    assert caught.value.reason == reason
    assert reason in REASONS


def test_the_limit_is_the_callers():
    data = encode(noise((40, 30)), "PNG")
    assert decode(data, max_pixels=1200).size == (40, 30)
    for read in (decode, open_header):
        with pytest.raises(PictureError, match="too_many_pixels"):
            read(data, max_pixels=1199)


def test_only_the_formats_that_are_named_are_tried():
    data = encode(noise((40, 30)), "BMP")
    assert decode(data).format == decode(data, formats=("BMP", "PNG", "NO SUCH FORMAT")).format == "BMP"
    with pytest.raises(PictureError, match="not_a_picture"):
        decode(data, formats=("JPEG", "PNG"))


def test_a_large_jpeg_is_decoded_at_a_scale_that_still_has_both_sides():
    data = encode(noise((800, 600)))
    assert decode(data).size == (800, 600)
    assert decode(data, side=150).size == (200, 150)
    assert decode(data, side=151).size == (400, 300)
    np.testing.assert_array_equal(np.asarray(decode(data, side=601)), np.asarray(Image.open(io.BytesIO(data))))


def test_decoding_imports_no_torch():
    program = "import sys, diptych.decode, diptych.curate.images.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
