import io
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.errors import PictureError, UsageError
from diptych.image import Crop, Preprocess, open_picture, read_crop
from samples import draw, encode, noise
from test_decode import UNUSABLE


def test_a_crop_of_what_is_no_usable_picture_has_the_reason_of_decoding():
    for data, reason in UNUSABLE:
        with pytest.raises(PictureError) as caught:
            read_crop(data, Crop(), 32)
        assert caught.value.reason == reason


@pytest.mark.parametrize("size", [(32, 32), (37, 53), (53, 37), (1000, 33), (33, 500), (224, 224), (225, 224)])
def test_preprocessing_equals_resize_centre_crop_normalise(size):
    image = noise(size)
    preprocess = Preprocess(image_size=32)
    short = min(size)
    wide = image.resize(
        (
            32 if size[0] == short else int(32 * size[0] / short),
            32 if size[1] == short else int(32 * size[1] / short),
        ),
        Image.Resampling.BICUBIC,
    )
    left, top = round((wide.width - 32) / 2), round((wide.height - 32) / 2)
    pixels = np.asarray(wide.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    expected = (pixels - np.array(preprocess.mean)) / np.array(preprocess.std)
    np.testing.assert_allclose(preprocess(image).numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_three_channels(mode):
    image = noise().convert("L") if mode == "I;16" else noise()
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    assert Preprocess(image_size=32)(image).shape == (3, 32, 32)


def test_a_picture_may_be_a_path_bytes_an_array_or_pillows(tmp_path):
    image = noise()
    path = tmp_path / "a.png"
    image.save(path)
    expected = np.asarray(image)
    for picture in (image, path, str(path), path.read_bytes(), expected):
        np.testing.assert_array_equal(np.asarray(open_picture(picture)), expected)


def test_a_missing_path_and_a_wrong_array_are_told_apart(tmp_path):
    with pytest.raises(PictureError, match="missing: no such picture"):
        open_picture(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(PictureError, match=r"not_a_picture: .*text\.jpg"):
        open_picture(tmp_path / "text.jpg")
    with pytest.raises(UsageError, match=r"use uint8 \[H, W, 3\]"):
        open_picture(np.zeros((4, 4), dtype=np.uint8))


def test_a_crop_is_the_square_it_says():
    image = Image.new("RGB", (100, 50), "white")
    image.paste("black", (50, 0, 100, 50))
    left = read_crop(encode(image, "PNG"), Crop(side=1.0, left=0.0), 16)
    right = read_crop(encode(image, "PNG"), Crop(side=1.0, left=1.0), 16)
    assert left[:, :, :-1].min() > 250  # the last column is within the filter's reach of the edge
    assert right[:, :, 1:].max() < 5


def test_an_integer_crop_of_a_png_equals_pillows_resize_of_that_square():
    image = noise((90, 60))
    crop = Crop(side=0.5, left=0.5, top=1.0)  # a square of 30 at (30, 30)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, box=(30, 30, 60, 60))
    got = read_crop(encode(image, "PNG"), crop, 16)
    np.testing.assert_array_equal(got, np.asarray(expected).transpose(2, 0, 1))


def test_a_large_jpeg_is_decoded_at_reduced_scale_and_stays_close_to_pillow():
    image = draw("orange", "ring", 1024)
    data = encode(image, quality=90)
    with mock.patch("diptych.image.decode", side_effect=AssertionError("all of it was decoded")):
        read_crop(data, Crop(), 64)
    fast = read_crop(data, Crop(), 64).astype(float)
    exact = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(fast - exact).mean() < 1.0  # of 255


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_jpegs_of_any_kind_are_read(options):
    assert read_crop(encode(noise(), **options), Crop(), 32).shape == (3, 32, 32)


def test_grey_and_cmyk_jpegs_are_read_as_pillow_reads_them():
    for image in (noise().convert("L"), noise().convert("CMYK")):
        data = encode(image)
        got = read_crop(data, Crop(), 37).astype(float)
        exact = (
            Image.open(io.BytesIO(data)).convert("RGB").resize((37, 37), Image.Resampling.BICUBIC, box=(0, 8, 37, 45))
        )
        assert np.abs(got - np.asarray(exact).transpose(2, 0, 1)).mean() < 2.0


def test_normalisation_of_a_batch_equals_that_of_each_picture():
    preprocess = Preprocess(image_size=32)
    images = [noise(seed=seed) for seed in range(3)]
    pixels = torch.from_numpy(np.stack([preprocess.pixels(image) for image in images]))
    torch.testing.assert_close(preprocess.normalize(pixels), torch.stack([preprocess(image) for image in images]))
