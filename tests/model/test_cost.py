"""The arithmetic against the real model: parameters and operations to the last one, memory within what is left out."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diptych.errors import UsageError
from diptych.model import cost
from diptych.model.clip import CLIP
from diptych.model.config import PRESETS, SMALL_PRESETS, get_preset
from diptych.model.transformer import Sight
from diptych.train.parallel.wrap import recompute_blocks
from samples import TINY_RESNET, TINY_VIT

PAIRS, TOKENS = 8, 13
SMALL = {
    "two layers": TINY_VIT,
    "two layers, gelu": replace(TINY_VIT, activation="gelu"),
    "one layer": replace(TINY_VIT, vision=replace(TINY_VIT.vision, layers=1), text=replace(TINY_VIT.text, layers=1)),
    "a wide mlp": replace(TINY_VIT, vision=replace(TINY_VIT.vision, mlp_ratio=5.5)),
    "a conv stem": replace(TINY_VIT, vision=replace(TINY_VIT.vision, stem="conv")),
    "a ResNet": TINY_RESNET,
    "a deeper ResNet": replace(TINY_RESNET, vision=replace(TINY_RESNET.vision, layers=(2, 1, 3, 1), image_size=64)),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def captions(context_length: int, end: int) -> torch.Tensor:
    text = torch.zeros(PAIRS, context_length, dtype=torch.int64)
    text[:, : TOKENS - 1] = torch.randint(1, end, (PAIRS, TOKENS - 1))
    text[:, TOKENS - 1] = end
    return text


def inputs(config) -> tuple[torch.Tensor, torch.Tensor]:
    size = config.vision.image_size
    return torch.randn(PAIRS, 3, size, size), captions(config.text.context_length, config.text.vocab_size - 1)


def count_flops(function, *arguments) -> float:
    """Of one pair. The fused kernels of the CPU are not in the counter's list, the plain products are."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() / PAIRS


def saved_bytes(module: nn.Module, x: torch.Tensor) -> float:
    """Of one pair: every storage that is kept for the backward pass and is no parameter, once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters) / PAIRS


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_the_models_to_the_last_one(name):
    config = get_preset(name)
    with torch.device("meta"):
        model = CLIP(config)
    assert cost.image_tower(config).parameters == count(model.visual)
    assert cost.text_tower(config, 16).parameters == count(model.text)


@pytest.mark.parametrize("name", PRESETS)
def test_operations_of_every_preset_are_the_models_to_the_last_one(name):
    config = get_preset(name)
    size, width = config.vision.image_size, config.text.width
    with torch.device("meta"):
        model = CLIP(config).eval()
        image, text = torch.empty(PAIRS, 3, size, size), torch.empty(PAIRS, TOKENS, width)
        ends = torch.zeros(PAIRS, dtype=torch.int64)
    assert cost.image_tower(config).flops == count_flops(model.visual, image)
    projection = 2 * width * config.embed_dim  # tokens have no values on the meta device, so the rest goes alone
    blocks = count_flops(model.text.transformer, text, ends, Sight(is_causal=True))
    assert cost.text_tower(config, TOKENS).flops == blocks + projection


@pytest.mark.parametrize("config", [*SMALL.values(), *SMALL_PRESETS.values()], ids=[*SMALL, *SMALL_PRESETS])
def test_operations_of_small_models_are_counted_while_they_run(config):
    model, (image, text) = CLIP(config).eval(), inputs(config)
    assert cost.image_tower(config).flops == count_flops(model.visual, image)
    assert cost.text_tower(config, TOKENS).flops == count_flops(model.text, text)


@pytest.mark.parametrize("config", [*SMALL.values(), *SMALL_PRESETS.values()], ids=[*SMALL, *SMALL_PRESETS])
def test_activations_are_what_is_really_kept_for_the_backward_pass(config):
    model, (image, text) = CLIP(config), inputs(config)
    planned = cost.image_tower(config).activation_bytes(4), cost.text_tower(config, TOKENS).activation_bytes(4)
    assert planned == pytest.approx((saved_bytes(model.visual, image), saved_bytes(model.text, text)), rel=0.04)


@pytest.mark.parametrize("name", ["ViT-Ti-16", "RN-Ti"])
def test_activations_in_bfloat16_are_what_autocast_keeps(name):
    config = SMALL_PRESETS[name]
    model, (image, text) = CLIP(config), inputs(config)
    with torch.autocast("cpu", torch.bfloat16):
        real = saved_bytes(model.visual, image), saved_bytes(model.text, text)
    towers = cost.image_tower(config), cost.text_tower(config, TOKENS)
    weights = [sum(2 * p.numel() for p in products(tower)) / PAIRS for tower in (model.visual, model.text)]
    planned = [tower.activation_bytes(2) + copies for tower, copies in zip(towers, weights, strict=True)]
    assert planned == pytest.approx(real, rel=0.05)


def products(tower: nn.Module) -> list[nn.Parameter]:
    """Weights that autocast keeps a copy of."""
    layers = [m.weight for m in tower.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers + [p for name, p in tower.named_parameters(recurse=False) if name in ("proj", "text_projection")]


@pytest.mark.parametrize("config", [TINY_VIT, SMALL_PRESETS["ViT-Ti-16"], TINY_RESNET], ids=["tiny", "small", "ResNet"])
def test_recomputing_is_counted_as_the_engine_does_it(config):
    plain, recomputed = CLIP(config), CLIP(config)
    recompute_blocks(recomputed)
    for tower, x, planned in zip(
        ("visual", "text"), inputs(config), (cost.image_tower(config), cost.text_tower(config, TOKENS)), strict=True
    ):
        flops = [count_backward_flops(getattr(model, tower), x) for model in (plain, recomputed)]
        assert flops[1] - flops[0] == planned.recomputed_flops
        inputs_only = saved_bytes(getattr(recomputed, tower), x)
        largest = max((b.inside.activation_bytes(4) - b.input.activation_bytes(4) for b in planned.blocks), default=0)
        assert planned.activation_bytes(4, recompute=True) == pytest.approx(inputs_only + largest, rel=0.04)


def count_backward_flops(module: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(x).sum().backward()
    return counter.get_total_flops() / PAIRS


def test_the_vit_of_the_paper_keeps_a_known_number_of_bytes():
    tower, tokens, width = cost.image_tower(get_preset("ViT-B-32")), 50, 768
    whole = tower.blocks[0].inside
    assert whole.activation_bytes(4) == 4 * tokens * (16 * width + 12 + 4)  # 8 D + 2 * 4 D, heads, statistics
    assert whole.activation_bytes(2) == tokens * (36 * width + 4 * (12 + 4))
    assert tower.activation_bytes(4, recompute=True) == pytest.approx(
        4 * tokens * width * (12 + 1 + 15) + 4 * 3 * 224**2, rel=0.01
    )


@pytest.mark.parametrize("tokens", [1, 78])
def test_a_caption_must_fit_the_text_tower(tokens):
    with pytest.raises(UsageError, match="use 2 to 77"):
        cost.text_tower(get_preset("ViT-B-32"), tokens)
