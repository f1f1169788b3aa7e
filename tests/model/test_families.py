"""Towers of later families beside open_clip's and timm's, and the same features faster."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.formats import open_clip, timm
from diptych.checkpoint.formats.open_clip_config import read_config
from diptych.errors import UsageError
from diptych.model import cost
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, TextConfig, ViTConfig
from diptych.model.inference import int8
from diptych.model.inference.precision import get_ready
from diptych.model.inference.text import encode_texts
from diptych.model.inference.vision import get_encoder
from diptych.model.text import see_padding_once
from golden.families import FAMILIES, TIMM, end_texts
from golden.weights import draw, inputs

FEATURES = np.load(Path(__file__).parents[1] / "fixtures" / "families.npz")
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_FIELDS = {
    "img_size": "image_size",
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "attn_pool_num_heads": "pool_heads",
    "act_layer": "activation",
}


def shrink(name: str) -> ViTConfig:
    """timm's tower of this name as `TIMM` makes it."""
    given = dict(TIMM[name])
    grid = given.pop("ref_feat_shape", None)
    small: dict[str, Any] = {_FIELDS.get(key, key): value for key, value in given.items()}
    return replace(timm.VITS[name], **small, **({"rotary_grid": grid[0]} if grid else {}))


def read(name: str, monkeypatch: pytest.MonkeyPatch) -> CLIPConfig:
    monkeypatch.setattr(timm, "VITS", {timm_name: shrink(timm_name) for timm_name in TIMM})
    return read_config(FAMILIES[name], "gelu")


def build(config: CLIPConfig) -> CLIP:
    """A model whose tensors are drawn by the names that OpenCLIP has for them."""
    model, weights = CLIP(config), {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        source = open_clip.find_place(name, config, "text.")
        drawn = {
            key: torch.from_numpy(np.asarray(draw(key, tuple(part.shape)))) for key, part in source.give(tensor).items()
        }
        weights[name] = source.take(list(drawn.values()))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def draw_inputs(config: CLIPConfig, name: str) -> tuple[Tensor, Tensor]:
    text = FAMILIES[name]["text_cfg"]
    pictures, tokens = inputs(config.vision.image_size, text["context_length"], text["vocab_size"])
    return torch.from_numpy(pictures), torch.from_numpy(end_texts(tokens, text))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_features_are_open_clips(name, monkeypatch):
    config = read(name, monkeypatch)
    model, (image, text) = build(config), draw_inputs(config, name)
    assert distance(model.encode_image(image), torch.from_numpy(FEATURES[f"{name}/image"])) < 2e-6
    assert distance(model.encode_text(text), torch.from_numpy(FEATURES[f"{name}/text"])) < 2e-6


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_config_that_is_written_is_read_as_the_same(name, monkeypatch):
    config = read(name, monkeypatch)
    assert open_clip.open_clip_config.why_not(config) is None
    state = open_clip.write_state(build(config))
    names = {key: key for key in [*state, "text_decoder.cross_attn.0.ln_1.weight"]}
    sources = open_clip.find_sources(names, config)
    assert sources.keys() == {key for key in CLIP(config).state_dict() if "num_batches" not in key} | {
        key for key in sources if "num_batches" in key
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_every_precision_keeps_to_the_bound(name, precision, monkeypatch):
    monkeypatch.setattr(int8, "compile_rows", lambda function, examples: function)
    config = read(name, monkeypatch)
    model, (_, text) = build(config), draw_inputs(config, name)
    coarse = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    size = config.vision.image_size
    pixels = (F.interpolate(coarse, (size, size), mode="bilinear") * 255).to(torch.uint8)
    expected = model.visual.pool((pixels / 255 - 0.5) / 0.5)
    pooled = get_encoder(model.visual, precision, MEAN, STD)(pixels)
    bound = {"float32": 1 - 1e-6, "bfloat16": 0.9995, "int8": 0.999}[precision]
    assert F.cosine_similarity(pooled.double(), expected.double()).min() > bound
    features = encode_texts(model.text, get_ready(model.text.transformer, precision), text)
    assert F.cosine_similarity(features.double(), model.encode_text(text).double()).min() > min(bound, 0.9995)


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_the_models(name, monkeypatch):
    config = read(name, monkeypatch)
    model = CLIP(config)
    assert cost.image_tower(config).parameters == sum(p.numel() for p in model.visual.parameters())
    assert cost.text_tower(config, 9).parameters == sum(p.numel() for p in model.text.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_patches_in_another_order_are_all_patches_and_gradients_reach_every_weight(name, monkeypatch):
    config = read(name, monkeypatch)
    model, (image, text) = build(config), draw_inputs(config, name)
    patches = torch.arange(config.vision.grid**2).flip(0).expand(len(image), -1)
    output = model(image, text, patches)
    torch.testing.assert_close(output.image_features, model(image, text).image_features, rtol=0, atol=1e-5)
    (output.image_features @ output.text_features.T * torch.randn(3, 3)).sum().backward()
    still = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert set(still) <= {"logit_scale", "logit_bias"}


def test_a_token_of_coca_sees_what_stands_before_it_and_one_of_the_padding():
    seen = see_padding_once(torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]]), 0)[:, 0].int()
    assert seen[0].tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert seen[1, -1].tolist() == [1, 1, 1, 1, 1]


def test_padding_reaches_a_text_feature_where_the_tower_sees_it_and_only_there():
    text = torch.tensor([[1, 5, 9, 0, 0, 0]])
    for changes, same in (({}, True), ({"is_causal": False}, False), ({"pool": "last"}, False)):
        tower = CLIP(replace(SMALL, text=replace(SMALL.text, **changes))).eval()
        changed = text.clone()
        changed[:, 4] = 3
        assert torch.allclose(tower.encode_text(text), tower.encode_text(changed), atol=1e-6) == same
        assert torch.allclose(tower.encode_text(text), tower.encode_text(F.pad(text, (0, 2))), atol=1e-6)


SMALL = CLIPConfig(
    embed_dim=8,
    vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(context_length=8, vocab_size=10, width=16, layers=2, heads=2),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False}, "pool 'class' reads the class token"),
        ({"rotary_grid": 2, "heads": 8}, "rotary positions need 4 n channels a head"),
        ({"stem": "mobile"}, "patches of 16 px"),
        ({"pool": "latent", "pool_heads": 3}, "not divisible by pool_heads 3"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_towers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(SMALL.vision, **changes)


def test_a_tower_without_projection_has_the_width_of_the_space():
    with pytest.raises(UsageError, match="vision has no projection: its width 16 must be embed_dim 8"):
        replace(SMALL, vision=replace(SMALL.vision, projection="none"))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_cfg", "timm_model_name", "hf-hub:somebody/model", "timm has no model"),
        ("text_cfg", "norm_kwargs", {"eps": "small"}, "norm_kwargs"),
        ("text_cfg", "act_kwargs", {"approximate": "no"}, "act_kwargs"),
        ("text_cfg", "pool_type", "mean", "pool_type = mean"),
        ("vision_cfg", "ls_init_value", 1e-4, "ls_init_value"),
        ("text_cfg", "pad_id", -1, "pad_id"),
    ],
)
def test_an_open_clip_config_of_something_else_is_refused_by_its_value(section, key, value, message):
    config = {**FAMILIES["CLIPA"], section: {**FAMILIES["CLIPA"][section], key: value}}
    with pytest.raises((UsageError, ValueError), match=message):
        read_config(config, "gelu")
