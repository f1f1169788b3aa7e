import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.embed.images import ImageTower, embed_images, encode_each
from diptych.embed.stream import encode_stream
from diptych.embed.texts import TextEncoder, embed_texts
from diptych.errors import PictureError
from diptych.model.inference.precision import choose_precision
from diptych.prefetch import map_ahead
from samples import TINY_RESNET, TINY_VIT, encode, make_loaded, noise

CONV_STEM = replace(TINY_VIT, vision=replace(TINY_VIT.vision, stem="conv"))


def smooth(size: tuple[int, int], seed: int = 0):
    """Colours that change slowly, as in photos."""
    return noise((8, 6), seed).resize(size)


def test_many_pictures_come_out_as_each_alone():
    loaded = make_loaded(TINY_VIT)
    pictures = [encode(noise((40 + i, 50), i)) for i in range(19)]
    expected = torch.stack([loaded.model.encode_image(loaded.preprocess(noise_of)[None], normalize=True)[0]
                            for noise_of in map(decode, pictures)]).detach()  # fmt: skip
    torch.testing.assert_close(embed_images(loaded, iter(pictures), 4), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed_images(loaded, pictures), expected, rtol=1e-4, atol=1e-5)


def decode(data: bytes):
    from diptych.image import open_picture

    return open_picture(data)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_quicker_precisions_keep_to_the_bound(config, precision):
    loaded = make_loaded(config)
    pictures = [encode(smooth((150 + 7 * i, 120 + 3 * i), i)) for i in range(12)]
    exact, quick = embed_images(loaded, pictures), embed_images(loaded, pictures, precision=precision)
    assert (exact * quick).sum(dim=1).min() >= 0.999
    assert quick.dtype == torch.float32


def test_a_tower_is_made_ready_once_and_again_when_its_weights_change():
    loaded = make_loaded(TINY_VIT)
    first, second = ImageTower(loaded, "bfloat16"), ImageTower(loaded, "bfloat16")
    assert first._encode is second._encode
    with torch.no_grad():
        loaded.model.visual.conv1.weight.mul_(2)
    third = ImageTower(loaded, "bfloat16")
    assert third._encode is not first._encode
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact = ImageTower(loaded, "exact").encode(pixels)
    assert (exact * third.encode(pixels)).sum(dim=1).min() > 0.999


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET, CONV_STEM], ids=["vit", "resnet", "conv stem"])
@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
def test_what_was_made_ready_goes_with_its_model(config, precision):
    loaded = make_loaded(config)
    embed_images(loaded, [noise()], precision=precision)
    model = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert model() is None


def test_a_broken_picture_among_many_is_raised_and_stops_the_threads():
    loaded = make_loaded(TINY_VIT)
    before = threading.active_count()
    pictures = [encode(noise(seed=i)) if i != 9 else b"no picture" for i in range(20)]
    with pytest.raises(PictureError, match="not_a_picture"):
        embed_images(loaded, pictures, 4)
    assert threading.active_count() == before


def test_auto_is_what_the_device_multiplies_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_precision("auto", torch.device("cuda")) == "bfloat16"
    assert choose_precision("auto", torch.device("cpu")) in ("float32", "bfloat16")


def test_embedding_leaves_pytorchs_threads_as_they_were():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        embed_images(make_loaded(TINY_VIT), [noise(seed=i) for i in range(9)], 2)
        assert torch.get_num_threads() == 2
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert other == [2]
    finally:
        torch.set_num_threads(threads)


def test_work_ahead_is_bounded_and_in_order():
    under_way, most = 0, 0
    lock = threading.Lock()
    taken: list[int] = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def double(i: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        with lock:
            under_way -= 1
        return 2 * i

    results = map_ahead(double, items(), threads=3, ahead=5)
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == [2 * i for i in range(1, 50)]
    assert most <= 3
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda i: 1 // i, [1, 0], threads=2, ahead=2))


@pytest.mark.parametrize("size", [(32, 32), (37, 53), (53, 37), (500, 33), (33, 500), (301, 203), (20, 31)])
@pytest.mark.parametrize("how", [{}, {"resize": "squash"}, {"interpolation": "bilinear"}], ids=str)
def test_quick_pixels_of_what_is_not_scaled_are_off_by_rounding(size, how):
    preprocess = make_loaded(TINY_VIT, **how).preprocess
    image = smooth(size)  # noise overshoots in between the two directions, whose order is Pillow's own choice
    difference = preprocess.quick_pixels(image).astype(int) - preprocess.pixels(image)
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.3


@pytest.mark.parametrize("size", [(400, 300), (401, 303), (333, 517), (1001, 667)])
def test_quick_pixels_of_a_large_jpeg_lie_where_the_exact_ones_do(size):
    preprocess = make_loaded(TINY_VIT).preprocess
    image = noise((12, 9)).resize(size)
    data = encode(image)
    exact, quick = preprocess.pixels(decode(data)), preprocess.quick_pixels(data)
    assert np.abs(exact.astype(int) - quick).max() <= 16  # noise of 8 bits, shifted by a pixel, is off by 100


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_pictures_that_are_no_plain_rgb_are_preprocessed_exactly(mode, tmp_path):
    preprocess = make_loaded(TINY_VIT).preprocess
    image = noise((70, 50)).convert("L" if mode == "I;16" else mode)
    image = image.convert("I;16") if mode == "I;16" else image
    path = tmp_path / "a.tif"
    image.save(path)
    np.testing.assert_array_equal(preprocess.quick_pixels(path), preprocess.pixels(decode(path.read_bytes())))


def test_what_cannot_be_used_stands_between_the_features_of_the_rest():
    loaded = make_loaded(TINY_VIT)
    for count, broken in ((1, {0}), (5, {2}), (21, {0, 3, 4, 5, 20})):
        pictures = [b"no picture" if i in broken else encode(noise(seed=i)) for i in range(count)]
        found = list(encode_each(ImageTower(loaded, "exact"), iter(pictures), 4))
        assert {i for i, one in enumerate(found) if isinstance(one, PictureError)} == broken
        good = [i for i in range(count) if i not in broken]
        if good:
            expected = embed_images(loaded, [pictures[i] for i in good])
            torch.testing.assert_close(torch.stack([found[i] for i in good]), expected, rtol=1e-4, atol=1e-5)


def test_texts_take_the_way_of_images():
    loaded = make_loaded(TINY_VIT)
    texts = [f"{'a ' * (i % 7)}cat {i}" for i in range(21)]
    found = [feature for _, feature in encode_stream(TextEncoder(loaded, "exact"), enumerate(texts), batch_size=4)]
    torch.testing.assert_close(torch.stack(found), embed_texts(loaded, texts), rtol=1e-4, atol=1e-5)
