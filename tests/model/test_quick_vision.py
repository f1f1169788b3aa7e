from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, TextConfig, ViTConfig
from diptych.model.inference import int8
from diptych.model.inference.vision import READ, attend, get_encoder
from diptych.model.vision import VisionTransformer
from reference.int8 import encode_int8
from samples import TINY_RESNET, TINY_VIT


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
TEXT = TextConfig(width=64, heads=1, layers=1)
VISION = ViTConfig(image_size=64, patch_size=16, width=128, layers=5, heads=2)
PLAIN = CLIPConfig(vision=VISION, text=TEXT, embed_dim=96)
CONFIGS = {
    "quick_gelu": PLAIN,
    "gelu": replace(PLAIN, activation="gelu"),
    "long": replace(PLAIN, vision=replace(VISION, image_size=96, patch_size=8, layers=2)),
    "conv stem": replace(PLAIN, vision=replace(VISION, stem="conv", layers=3)),
}


def build(config: CLIPConfig, count: int = 6) -> tuple[CLIP, torch.Tensor]:
    """A model, and pictures whose neighbouring pixels are alike."""
    torch.manual_seed(0)
    model, size = CLIP(config).eval(), config.vision.image_size
    coarse = torch.rand(count, 3, 4, 4)
    return model, (F.interpolate(coarse, (size, size), mode="bilinear") * 255).to(torch.uint8)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def pool(model: CLIP, image: torch.Tensor) -> torch.Tensor:
    return model.visual.pool(image) if isinstance(model.visual, VisionTransformer) else model.visual(image)


@pytest.fixture
def uncompiled(monkeypatch):
    """The type hook does not compile; `test_compiled` does, in a process of its own."""
    monkeypatch.setattr(int8, "compile_rows", lambda function, examples: function)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_every_precision_keeps_to_the_bound(config, precision, uncompiled):
    model, pixels = build(CONFIGS[config])
    expected = pool(model, normalize(pixels))
    features = get_encoder(model.visual, precision, MEAN, STD)(pixels)
    assert features.dtype == torch.float32
    cosine = F.cosine_similarity(features.double(), expected.double())
    assert cosine.min() > {"float32": 1 - 1e-6, "bfloat16": 0.9999, "int8": 0.999}[precision]
    if precision != "float32":
        assert cosine.max() < 1 - 1e-9  # it is another computation


@pytest.mark.parametrize("config", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_int8_equals_its_plain_twin(config, uncompiled):
    model, pixels = build(CONFIGS[config], 3)
    expected = encode_int8(model.visual, normalize(pixels))
    features = get_encoder(model.visual, "int8", MEAN, STD)(pixels)
    assert F.cosine_similarity(features, expected).min() > 0.9997  # the twin does not round to bfloat16 in between


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@torch.inference_mode()
def test_a_picture_alone_is_the_picture_among_others(precision, uncompiled):
    model, pixels = build(CONFIGS["quick_gelu"])
    encode = get_encoder(model.visual, precision, MEAN, STD)
    together = encode(pixels)
    for i in (0, 5):  # one picture alone may be rounded otherwise; another picture is a hundredth away
        assert F.cosine_similarity(encode(pixels[i : i + 1])[0].double(), together[i].double(), dim=0) > 1 - 1e-4


@torch.inference_mode()
def test_a_resnet_without_its_batch_statistics_is_the_resnet():
    model, pixels = build(TINY_RESNET)
    for module in model.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-1, 1)
    expected = pool(model, normalize(pixels))
    features = get_encoder(model.visual, "bfloat16", MEAN, STD)(pixels)
    assert F.cosine_similarity(features, expected).min() > 0.999
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.visual.modules())  # the model is untouched


@torch.inference_mode()
def test_attention_is_pytorchs():
    torch.manual_seed(0)
    for length, dtype in ((5, torch.float32), (5, torch.bfloat16), (130, torch.bfloat16)):
        qkv = torch.randn(3, length, 3 * 32).to(dtype)
        q, k, v = qkv.float().view(3, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(attend(qkv, 4, length).float(), expected, **near)
        torch.testing.assert_close(attend(qkv, 4, READ).float(), expected[:, :READ], **near)


@torch.inference_mode()
def test_a_model_that_was_loaded_in_bfloat16_is_used_as_it_is():
    model, pixels = build(TINY_VIT)
    model.to(torch.bfloat16)
    features = get_encoder(model.visual, "bfloat16", MEAN, STD)(pixels)
    torch.testing.assert_close(features, pool(model, normalize(pixels).bfloat16()).float(), rtol=1e-2, atol=1e-2)


@torch.inference_mode()
def test_rows_of_zeros_and_of_outliers_are_finite(uncompiled):
    x = torch.zeros(4, 64)
    x[1], x[2, 3], x[3] = 1e-20, 1e6, -1e-3
    values, scale = int8.quantize_rows(x)
    restored = (values.float() - 128) * scale
    assert restored.isfinite().all()
    torch.testing.assert_close(restored, x, rtol=0, atol=1e6 / 254)
    for name, function in (("quick_gelu", F.silu), ("gelu", F.gelu), ("gelu_tanh", tanh_gelu)):
        h = torch.linspace(-30, 30, 61).repeat(3, 1)
        h[1], h[2] = -5.0, h[2].clamp(max=-0.5)
        values, scale = int8.activate(h, torch.ones(3, 1), torch.zeros(61), name)
        error = ((values.float() - 128) * scale - function(h)).abs()
        assert (error <= 0.51 * scale).all()


def test_int8_is_refused_where_it_would_saturate(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    model, _ = build(TINY_VIT)
    with pytest.raises(ValueError, match="int8 needs a processor with VNNI or AMX"):
        get_encoder(model.visual, "int8", MEAN, STD)


def test_a_resnet_has_no_int8():
    model, _ = build(replace(TINY_RESNET))
    with pytest.raises(ValueError, match="int8 is for Vision Transformers"):
        get_encoder(model.visual, "int8", MEAN, STD)
