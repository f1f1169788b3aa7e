"""Checkpoints that open_clip and transformers wrote, and what they compute from them (golden/make_checkpoints.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.checkpoint import layouts
from diptych.checkpoint.surgery import resize_grid
from golden.weights import inputs

FOLDER = Path(__file__).parents[1] / "fixtures" / "checkpoints"
FEATURES = np.load(FOLDER / "features.npz")
POSITIONS = np.load(FOLDER / "positions.npz")


@pytest.mark.parametrize(
    ("name", "layout", "activation"),
    [
        ("open_clip_vit", "open_clip", "quick_gelu"),
        ("open_clip_resnet", "open_clip", "gelu"),
        ("torchscript_vit", "TorchScript archive", "quick_gelu"),
        ("torchscript_resnet", "TorchScript archive", "gelu"),
        ("transformers_vit", "transformers", "gelu"),
    ],
)
@torch.inference_mode()
def test_features_are_those_of_the_library_that_wrote_the_checkpoint(name, layout, activation):
    place = FOLDER / name / "model.pt" if name.startswith("torchscript") else FOLDER / name
    opened = layouts.open_checkpoint(place)
    assert (opened.layout, opened.config.activation) == (layout, activation)
    model, preprocess, tokenizer = layouts.load(place)
    assert (preprocess.image_size, tokenizer.vocab_size) == (model.config.vision.image_size, 520)
    image, text = map(torch.from_numpy, inputs(preprocess.image_size, 16, 520, pictures=2))
    for tower, ours in (("image", model.encode_image(image)), ("text", model.encode_text(text))):
        expected = torch.from_numpy(FEATURES[f"{name}/{tower}"])
        assert ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("resize", ["open_clip", "transformers"])
@pytest.mark.parametrize("side", [3, 8])
def test_positions_are_resized_as_the_library_of_that_name_does(resize, side):
    ours = resize_grid(torch.from_numpy(POSITIONS["grid"]), side, resize)
    assert (ours - torch.from_numpy(POSITIONS[f"{resize}_{side}"])).abs().max() < 1e-6
    other = {"open_clip": "transformers", "transformers": "open_clip"}[resize]
    assert (ours - torch.from_numpy(POSITIONS[f"{other}_{side}"])).abs().max() > 1e-2
