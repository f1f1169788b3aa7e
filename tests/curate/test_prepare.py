import hashlib
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from diptych.curate.images.blocklist import read_known
from diptych.curate.images.prepare import hash_picture, on_white, prepare
from diptych.errors import NotFoundError, PictureError, UsageError
from diptych.image_file import find_format
from samples import encode, noise

DEFAULTS = {"size": 64, "quality": 90, "keep_original": False, "min_side": 16, "max_aspect": 3.0, "max_pixels": 10**6}


def make(data: bytes, **changes):
    return prepare(data, **(DEFAULTS | changes))


def smooth(size: tuple[int, int]) -> Image.Image:
    return noise((7, 5)).resize(size, Image.Resampling.BICUBIC)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_small_upright_picture_keeps_its_bytes(format):
    data = encode(smooth((60, 50)), format)
    made = make(data)
    assert made.data == data
    assert (made.width, made.height, made.original_width, made.original_height) == (60, 50, 60, 50)


@pytest.mark.parametrize("format", ["GIF", "BMP", "AVIF", "TIFF"])
def test_formats_that_shards_do_not_take_become_jpeg(format):
    made = make(encode(smooth((60, 50)).quantize() if format == "GIF" else smooth((60, 50)), format))
    assert opened(made.data).format == "JPEG"
    assert find_format(encode(smooth((60, 50)), format)) == format


@pytest.mark.parametrize(("size", "expected"), [((400, 300), (85, 64)), ((300, 400), (64, 85)), ((65, 64), (65, 64))])
def test_a_large_picture_is_made_smaller_by_its_shorter_side(size, expected):
    image = smooth(size)
    made = make(encode(image))
    assert (made.width, made.height) == expected == opened(made.data).size
    assert (made.original_width, made.original_height) == size
    wanted = np.asarray(image.resize(expected, Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(opened(made.data), float) - wanted).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (300, 200)])
def test_a_picture_is_stored_upright(orientation, size):
    image = smooth(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, exif=exif.tobytes())
    made = make(data)
    upright = ImageOps.exif_transpose(opened(data))
    assert (made.original_width, made.original_height) == upright.size
    stored = opened(made.data)
    assert stored.getexif().get(0x0112, 1) == 1
    assert stored.size == (made.width, made.height)
    difference = np.asarray(stored, float) - np.asarray(upright.resize(stored.size, Image.Resampling.BICUBIC), float)
    assert np.abs(difference).mean() < 5


def test_the_original_may_be_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth((300, 200)), exif=exif.tobytes())
    made = make(data, keep_original=True)
    assert made.data == data
    assert (made.width, made.height, made.original_width, made.original_height) == (300, 200, 200, 300)


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    assert opened(make(encode(clear, "PNG")).data).getpixel((5, 5)) == (255, 255, 255)
    assert on_white(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(smooth((15, 60))), "too_small"),
        (encode(smooth((200, 60))), "aspect"),
        (encode(smooth((60, 200))), "aspect"),
        (encode(Image.new("L", (2000, 1000)), "PNG"), "too_many_pixels"),
        (encode(smooth((60, 50)))[:-200], "truncated"),
        (encode(noise((60, 50)), "PNG")[:2000], "truncated"),
        (b"not at all", "not_a_picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_a_picture"),
    ],
)
def test_pictures_that_cannot_be_used_have_a_reason(data, reason):
    with pytest.raises(PictureError) as caught:
        make(data)
    assert caught.value.reason == reason


def test_listed_pictures_are_recognised_by_bytes_and_by_looks(tmp_path):
    pictures = [encode(noise((9, 8), seed).resize((90, 80), Image.Resampling.BICUBIC)) for seed in range(5)]
    (tmp_path / "a").write_text(
        f"{hashlib.md5(pictures[0]).hexdigest()}  # seen 2024\n\n{hashlib.sha1(pictures[1]).hexdigest().upper()}\n"
        f"{hashlib.sha256(pictures[2]).hexdigest()}\n"
    )
    (tmp_path / "b").write_text(f"phash:{hash_picture(pictures[3]):016x}\n")
    known = read_known([tmp_path / "a", tmp_path / "b"], 4)
    assert [known(picture) for picture in pictures] == ["md5", "sha1", "sha256", "phash", None]
    again = encode(opened(pictures[3]).resize((60, 60)), quality=50)
    assert known(again) == "phash"
    assert known(b"no picture") is None
    assert bool(known)
    assert not read_known([], 4)


def test_a_list_with_a_line_that_is_no_hash_is_refused(tmp_path):
    (tmp_path / "a").write_text("# fine\n" + "a" * 32 + "\nabcd\n")
    with pytest.raises(UsageError, match="line 3: 'abcd' is no hash"):
        read_known([tmp_path / "a"], 4)
    with pytest.raises(NotFoundError, match="no such list"):
        read_known([tmp_path / "missing"], 4)
