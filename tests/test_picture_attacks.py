"""Pictures that strangers have: every format, mode, shape and damage, files that are no files, and other programs."""

import io
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from diptych import decode as decode_module
from diptych.decode import FORMATS, REASONS, decode, read_file
from diptych.errors import PictureError
from diptych.image import MAX_ASPECT, Crop, Preprocess, open_picture, read_crop
from strangers.pictures import many_scans, tiff_of_jpegs

SIZE = 32
PREPROCESS = Preprocess(image_size=SIZE)
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("RGB", "L", "1"),
    "TIFF": ("RGB", "RGBA", "L", "CMYK", "F", "I;16", "1"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("RGB", "RGBA", "L"),
}
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats that a build of Pillow may lack, and their names in `PIL.features`."""
SHAPES = [(1, 1), (1, 700), (700, 1), (3, 200), (SIZE, SIZE), (SIZE + 1, SIZE), (257, 64)]
CASES = [(name, mode, size) for name, modes in MODES.items() for mode in modes for size in SHAPES]


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)


def encode(image: Image.Image, name: str) -> bytes:
    if name in CODECS and not features.check(CODECS[name]):
        pytest.skip(f"this build of Pillow has no {name}")
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def see(data: bytes) -> list[np.ndarray]:
    """The picture by each of the ways into the towers."""
    return [
        PREPROCESS.pixels(open_picture(data)),
        PREPROCESS.quick_pixels(data),
        read_crop(data, Crop(), SIZE),
        Preprocess(image_size=SIZE, resize="squash").pixels(open_picture(data)),
    ]


def reason_of(data: bytes) -> str | None:
    try:
        see(data)
    except PictureError as error:
        return error.reason
    return None


@pytest.mark.parametrize(("name", "mode", "size"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_every_picture_gives_pixels_by_every_way(name, mode, size):
    for pixels in see(encode(noise(size, mode), name)):
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, SIZE, SIZE))


@pytest.mark.parametrize("name", MODES)
def test_damage_is_one_counted_reason_and_nothing_else(name):
    """Cuts, flips, exchanged and repeated stretches of a file; whatever Pillow stumbles over has a reason."""
    good, draws = encode(noise((60, 40), MODES[name][0]), name), random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        where = draws.randrange(len(data))
        match draws.randrange(4):
            case 0:
                del data[where:]
            case 1:
                for _ in range(draws.randrange(1, 8)):
                    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            case 2:
                del data[where : where + draws.randrange(64)]
            case 3:
                data[where:where] = data[: draws.randrange(64)]
        reason = reason_of(bytes(data))
        refused += reason is not None
        assert reason in (None, *REASONS)
    assert refused > 20


@pytest.mark.parametrize(
    "data",
    [b"\0" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"P6 9 9 255\n", b"<html>", b"x"],
)
def test_other_formats_reach_no_parser(data):
    with pytest.raises(PictureError, match="not_a_picture"):
        decode(data)


def test_no_format_that_is_read_starts_a_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    with pytest.raises(PictureError, match="not_a_picture"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert not (tmp_path / "started").exists()
    assert "EPS" not in FORMATS


# --- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("side", [64, 100, 256])
def test_training_sees_a_transparent_picture_as_prediction_does(mode, side):
    """A disc on a transparent ground whose hidden colour is white: white to whoever drops alpha before resizing."""
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    image.paste((255, 0, 0, 255), (side // 4, side // 4, side // 2, side // 2))
    data = encode(image.convert(mode), "PNG")
    trained, seen = read_crop(data, Crop(), SIZE), PREPROCESS.pixels(open_picture(data))
    assert np.abs(trained.astype(int) - seen).mean() < 2


# --- stripes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize(("short", "long"), [(1, 200), (7, 900), (40, 4000), (100, 6500)])
def test_the_centre_of_a_stripe_is_what_resizing_all_of_it_gives(mode, short, long, monkeypatch):
    for size in ((short, long), (long, short)):  # smooth: Pillow chooses the order of its two passes, which clip noise
        image = noise((9, 9), mode).resize(size, Image.Resampling.BILINEAR)
        if mode == "RGBA":
            image.putalpha(image.getchannel("A").point(lambda value: 128 + value // 2))
        quick = PREPROCESS.pixels(image)
        assert max(size) > MAX_ASPECT * min(size)
        with monkeypatch.context() as patch:
            patch.setattr("diptych.image.MAX_ASPECT", 10**9)
            whole = PREPROCESS.pixels(image)
        assert np.abs(quick.astype(int) - whole).max() <= (3 if mode == "RGBA" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 60_000), (1, 1_000_000), (99_999_999, 1), (65_000, 1)])
@pytest.mark.parametrize("way", ["pixels(open_picture(data))", "quick_pixels(data)"])
def test_a_stripe_of_any_length_takes_little_memory(tmp_path, size, way):
    encoded = tmp_path / "a.png"
    Image.new("L", size, 90).save(encoded, "PNG")
    script = f"""
import resource
from pathlib import Path
from diptych.image import Preprocess, open_picture
data = Path({str(encoded)!r}).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert abs(int(Preprocess(image_size=224).{way}.mean()) - 90) <= 1
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900_000
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# --- files that are no files -----------------------------------------------------------------------------------------


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.truncate(200 << 30)
    expected = {"pipe": "not_a_file", "folder": "not_a_file", "dangling": "missing", "holes": "too_many_bytes"}
    for name, reason in expected.items():
        with pytest.raises(PictureError) as caught:
            read_file(tmp_path / f"{name}.jpg")
        assert caught.value.reason == reason
        assert not caught.value.passes
    with pytest.raises(PictureError, match="unreadable"):
        read_file(Path("a\0b"))
    with pytest.raises(PictureError, match="not_a_file"):
        read_file(Path("/dev/null"))


@pytest.mark.parametrize("number", [5, 13, 24, 116])
def test_faults_of_the_machine_pass(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(decode_module.os, "open", fail)
    with pytest.raises(PictureError) as caught:
        read_file(tmp_path / "a.jpg")
    assert (caught.value.reason, caught.value.passes) == ("unreadable", True)


def test_a_shortage_of_memory_is_no_fault_of_the_picture(monkeypatch):
    data = encode(noise((9, 9)), "PNG")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(PictureError) as caught:
        decode(data)
    assert (caught.value.reason, caught.value.passes) == ("out_of_memory", True)


# --- odd but whole ---------------------------------------------------------------------------------------------------


def test_a_comment_of_megabytes_does_not_make_a_picture_unusable():
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * (3 << 20), zip=True)
    buffer = io.BytesIO()
    noise((40, 40)).save(buffer, "PNG", pnginfo=about)
    assert decode(buffer.getvalue()).size == (40, 40)


def test_the_filters_of_warnings_are_the_callers():
    data = [encode(noise((40, 40), mode), "PNG") for mode in ("P", "RGBA")]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        before = list(warnings.filters)
        threads = [
            threading.Thread(target=lambda: [decode(one) for one in itertools.islice(itertools.cycle(data), 200)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(warnings.filters) == before


def test_what_is_no_picture_at_all_is_a_usage_error():
    """In a process without the types that tests are checked by."""
    script = """
from diptych.errors import UsageError
from diptych.image import open_picture
for what in (None, 5, [1], object()):
    try:
        open_picture(what)
    except UsageError as error:
        assert "is not a picture" in str(error)
    else:
        raise AssertionError(what)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_an_array_without_a_pixel_is_too_small(shape):
    with pytest.raises(PictureError, match="too_small"):
        PREPROCESS.pixels(open_picture(np.zeros(shape, np.uint8)))


def test_a_jpeg_that_goes_over_its_pixels_again_and_again_is_refused_at_once():
    """100 kB that kept a processor for a minute."""
    data = many_scans()
    started = time.monotonic()
    for way in (decode, PREPROCESS.quick_pixels, lambda data: read_crop(data, Crop(), SIZE)):
        with pytest.raises(PictureError, match="too_many_pixels: 3000 x 3000 in 2,005 scans"):
            way(data)
    assert time.monotonic() - started < 5
    for few in (many_scans(3000, 3), many_scans(100, 2000)):  # usual, and many of few pixels
        decode(few)


def test_scans_are_counted_in_every_strip_of_a_tiff():
    """One of 3,000 x 3,000 pixels that is a JPEG; one of 300 x 60,000 whose 200 strips are the same."""
    for data, said in (
        (tiff_of_jpegs(many_scans()), "3000 x 3000 in 2,005 scans"),
        (tiff_of_jpegs(many_scans(300, 700), 300, 200), "300 x 60000 in 705 scans"),
    ):
        with pytest.raises(PictureError, match=f"too_many_pixels: {said}"):
            decode(data)
    plain = encode(Image.new("L", (300, 300), 90), "JPEG")
    assert decode(tiff_of_jpegs(plain, 300)).getpixel((9, 9)) == 90
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 4000), "red").save(buffer, "TIFF", compression="jpeg")  # 500 strips of a scan each
    assert decode(buffer.getvalue() + b"\xff\xda" * 100).size == (
        3000,
        4000,
    )  # behind all strips
