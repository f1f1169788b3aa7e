from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.checkpoint import layouts
from diptych.checkpoint.surgery import change_precision, resize_context, resize_grid, resize_image
from diptych.errors import UsageError
from samples import TINY_RESNET, TINY_VIT, make_loaded, small

POSITIONS = np.load(Path(__file__).parents[1] / "fixtures" / "checkpoints" / "positions.npz")


@pytest.mark.parametrize(("config", "image_size"), [(TINY_VIT, 64), (TINY_VIT, 16), (TINY_RESNET, 96)])
@pytest.mark.parametrize("resize", ["open_clip", "transformers"])
def test_a_tower_takes_pictures_of_another_size(tmp_path, config, image_size, resize):
    before = make_loaded(small(config))
    after = resize_image(before, image_size, resize)
    assert after.preprocess.image_size == after.model.config.vision.image_size == image_size
    assert after.model.encode_image(torch.zeros(2, 3, image_size, image_size)).shape == (2, 24)
    text = torch.tensor([[518, 5, 519] + [0] * 13])
    assert torch.equal(before.model.encode_text(text), after.model.encode_text(text))
    layouts.convert(after, tmp_path / "out", "diptych")
    assert before.model.config.vision.image_size == 32  # the one that was given is left alone
    name = "visual.positional_embedding" if config is TINY_VIT else "visual.attnpool.positional_embedding"
    assert torch.equal(before.model.state_dict()[name][0], after.model.state_dict()[name][0])


def test_the_same_size_changes_nothing():
    before = make_loaded(small(TINY_VIT))
    after = resize_image(before, 32)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(before.model.encode_image(image), after.model.encode_image(image))
    assert after.model.visual.proj.data_ptr() != before.model.visual.proj.data_ptr()


def test_a_constant_grid_stays_constant_and_the_first_place_is_kept():
    grid = torch.cat([torch.tensor([[7.0, -7.0]]), torch.tensor([[2.0, 3.0]]).expand(16, 2)])
    for resize in ("open_clip", "transformers"):
        resized = resize_grid(grid, 6, resize)
        assert torch.equal(resized[0], grid[0])
        assert (resized[1:] - torch.tensor([2.0, 3.0])).abs().max() < 1e-5


def test_what_cannot_be_is_refused():
    loaded = make_loaded(small(TINY_VIT))
    with pytest.raises(UsageError, match="image_size 50 is not a multiple of patch_size 8; use 48"):
        resize_image(loaded, 50)
    with pytest.raises(UsageError, match="context_length 2 leaves no room"):
        resize_context(loaded, 2)


def test_a_shorter_context_keeps_the_features_of_texts_that_fit():
    before = make_loaded(small(TINY_VIT))
    after = resize_context(before, 6)
    text = torch.tensor([[518, 5, 9, 300, 519, 0], [518, 519, 0, 0, 0, 0]])
    assert torch.equal(before.model.encode_text(text), after.model.encode_text(text))
    assert after.tokenizer(["the cat and the cat and the cat"]).shape == (1, 6)


def test_a_longer_context_is_interpolated_as_in_open_clip():
    before = make_loaded(small(TINY_VIT))
    with torch.no_grad():
        before.model.text.positional_embedding[:, :6] = torch.from_numpy(POSITIONS["curve"])
    after = resize_context(before, 24)
    ours = after.model.text.positional_embedding[:, :6]
    assert (ours - torch.from_numpy(POSITIONS["open_clip_context_24"])).abs().max() < 1e-6
    assert after.tokenizer(["cat"]).shape == (1, 24)


def test_another_precision_leaves_the_given_model_alone():
    before = make_loaded(small(TINY_RESNET))
    after = change_precision(before, "bfloat16")
    assert (before.model.dtype, after.model.dtype) == (torch.float32, torch.bfloat16)
    image = torch.randn(2, 3, 32, 32)
    a, b = before.model.encode_image(image), after.model.encode_image(image).float()
    assert 0 < ((a - b).norm() / a.norm()) < 0.1
