"""Our towers beside open_clip's and transformers': same weights, same inputs, their stored features."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from golden.weights import CONFIGS, TEXT, draw, inputs

FEATURES = np.load(Path(__file__).parents[1] / "fixtures" / "features.npz")


def openai_name(ours: str) -> str:
    """`text.transformer...attn.in_proj.weight` -> `transformer...attn.in_proj_weight`."""
    return ours.removeprefix("text.").replace(".in_proj.", ".in_proj_")


def build(name: str) -> CLIP:
    vision, embed_dim, quick_gelu = CONFIGS[name]
    tower = ViTConfig(**vision) if "patch_size" in vision else ResNetConfig(**vision)
    activation = "quick_gelu" if quick_gelu else "gelu"
    model = CLIP(CLIPConfig(embed_dim=embed_dim, vision=tower, text=TextConfig(**TEXT), activation=activation))
    weights = {
        key: torch.from_numpy(np.asarray(draw(openai_name(key), tuple(tensor.shape))))
        for key, tensor in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    model.load_state_dict(weights, strict=False)
    return model.eval()


@pytest.mark.parametrize("key", FEATURES.files)
@torch.inference_mode()
def test_features_equal_the_peers(key):
    _, name, tower = key.split("/")
    model, expected = build(name), torch.from_numpy(FEATURES[key])
    image, text = map(torch.from_numpy, inputs(CONFIGS[name][0]["image_size"]))
    ours = model.encode_image(image) if tower == "image" else model.encode_text(text)
    assert ((ours - expected).abs().max(dim=-1).values / expected.norm(dim=-1)).max() < 1e-5
    assert (1 - torch.nn.functional.cosine_similarity(ours, expected)).abs().max() < 1e-5


def test_every_family_is_compared_with_every_peer_that_has_it():
    compared = {tuple(key.split("/")[:2]) for key in FEATURES.files}
    assert {name for peer, name in compared if peer == "open_clip"} == set(CONFIGS)
    assert {name for peer, name in compared if peer == "transformers"} == {"vit-quickgelu", "vit-gelu"}
