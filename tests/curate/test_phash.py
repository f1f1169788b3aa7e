import io

import numpy as np
import pytest
from PIL import Image

from diptych.curate.images.phash import find_near, first_alike, near_duplicates, perceptual_hashes
from diptych.errors import UsageError
from samples import COLOURS, SHAPES, draw, encode, noise


def test_the_same_picture_in_other_clothes_has_nearly_the_same_hash():
    original = noise((16, 16)).resize((200, 200), Image.Resampling.BICUBIC)
    variants = [
        original.resize((90, 90)),
        Image.open(io.BytesIO(encode(original, quality=40))),
        original.point(lambda value: min(255, value + 12)),
    ]
    first, *rest = perceptual_hashes([original, *variants])
    assert [int(first ^ other).bit_count() <= 6 for other in rest] == [True] * 3


def test_different_pictures_have_different_hashes():
    hashes = perceptual_hashes(noise(seed=seed) for seed in range(20))
    distances = [int(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 10


@pytest.mark.parametrize("max_distance", [0, 1, 3, 7, 8, 12])
def test_bands_find_exactly_what_comparing_all_finds(max_distance):
    rng = np.random.default_rng(0)
    against = rng.integers(0, 2**64, 200, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 10), replace=False)) for _ in range(200)], np.uint64
    )
    hashes = np.concatenate([against ^ flips, rng.integers(0, 2**64, 50, dtype=np.uint64)])
    brute = [
        (i, j) for i, a in enumerate(hashes) for j, b in enumerate(against) if int(a ^ b).bit_count() <= max_distance
    ]
    assert near_duplicates(hashes, against, max_distance) == brute
    assert brute


def test_a_distance_that_no_two_hashes_have_is_refused():
    with pytest.raises(UsageError, match="max_distance 64"):
        near_duplicates(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 64)


def test_distances_come_with_the_pairs():
    hashes = np.array([0b0, 0b111], np.uint64)
    i, j, distance = find_near(hashes, np.array([0b1, 1 << 63], np.uint64), 2)
    assert list(zip(i.tolist(), j.tolist(), distance.tolist(), strict=True)) == [(0, 0, 1), (0, 1, 1), (1, 0, 2)]


def test_a_copy_is_taken_for_the_first_of_its_kind_and_chains_do_not_join():
    first, second, third = 0, 0b111, 0b111111  # 3 bits apart each; the ends 6
    assert first_alike(np.array([0x5555 << 40, first, second, third, first], np.uint64), 3).tolist() == [0, 1, 1, 3, 1]


def test_many_equal_hashes_cost_no_pairs():
    assert first_alike(np.zeros(300_000, np.uint64), 3).max() == 0


def test_shapes_of_another_colour_are_told_apart_from_other_shapes():
    same = perceptual_hashes(draw(colour, "ring", 64) for colour in COLOURS[:3])
    other = perceptual_hashes(draw("red", shape, 64) for shape in SHAPES)
    assert max(int(same[0] ^ h).bit_count() for h in same) < min(
        int(same[0] ^ h).bit_count() for shape, h in zip(SHAPES, other, strict=True) if shape != "ring"
    )


def test_no_picture_has_no_hash():
    assert len(perceptual_hashes([])) == 0
    assert near_duplicates(perceptual_hashes([]), perceptual_hashes([])) == []
