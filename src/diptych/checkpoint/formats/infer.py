"""The sizes of a model from the weights alone: from the shapes of its tensors, as OpenAI's own loader reads them.

They do not say how many heads a layer has (64 channels each is the paper's rule, a preset of the same sizes knows
better) nor which activation it was trained with.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from math import isqrt
from pathlib import Path

from diptych.checkpoint.weights.tensors import short
from diptych.errors import CheckpointError, UsageError
from diptych.model.config import (
    PRESETS,
    Activation,
    CLIPConfig,
    ResNetConfig,
    TextConfig,
    TimmConfig,
    TransformersTextConfig,
    ViTConfig,
    get_preset,
)

Shapes = Mapping[str, tuple[int, ...]]

CHANNELS_PER_HEAD = 64


def infer_config(
    shapes: Shapes, activation: Activation, preset: str | None, where: Path, names: Collection[str] = ()
) -> tuple[CLIPConfig, str]:
    """The config whose tensors have these shapes, and how the number of heads was decided. `names`: as in the file."""
    _refuse_other_families(shapes, where)
    if preset is not None:
        config = replace(get_preset(preset), activation=activation, logit_bias="logit_bias" in shapes)
        return config, f"preset {preset} was asked for"
    try:
        config = _infer(shapes, activation)
    except KeyError as error:
        missing, there = str(error.args[0]).removeprefix("text."), short(", ".join(sorted(names)[:3]))
        raise CheckpointError(
            f"{where} is no CLIP model: {missing} is missing from its {len(names)} tensors ({there}, ...)"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} is no CLIP model that we know: {error}") from None
    known = _same_sizes(config)
    if known is not None:
        name, config = known
        return config, f"sizes of {name}"
    widths = [config.text.width, *([config.vision.width] if isinstance(config.vision, ViTConfig) else [])]
    if any(width % CHANNELS_PER_HEAD for width in widths):
        raise UsageError(
            f"{where} does not say how many attention heads it has, and its widths {widths} are no multiples of "
            f"{CHANNELS_PER_HEAD}; name an architecture: preset=..., or give it a config (see docs/checkpoints.md)"
        )
    return config, f"{CHANNELS_PER_HEAD} channels a head, the paper's rule"


def _infer(shapes: Shapes, activation: Activation) -> CLIPConfig:
    embed_dim = _dims(shapes, "text.text_projection", 2)[1]
    text_width = _dims(shapes, "text.ln_final.weight", 1)[0]
    text = TextConfig(
        context_length=_dims(shapes, "text.positional_embedding", 2)[0],
        vocab_size=_dims(shapes, "text.token_embedding.weight", 2)[0],
        width=text_width,
        layers=_count(shapes, r"text\.transformer\.resblocks\.(\d+)\.ln_1\.weight"),
        heads=max(1, text_width // CHANNELS_PER_HEAD) if text_width % CHANNELS_PER_HEAD == 0 else 1,
        mlp_ratio=_dims(shapes, "text.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / text_width,
    )
    vision = _infer_vit(shapes) if "visual.class_embedding" in shapes else _infer_resnet(shapes)
    bias = "logit_bias" in shapes
    return CLIPConfig(embed_dim=embed_dim, vision=vision, text=text, activation=activation, logit_bias=bias)


def _infer_vit(shapes: Shapes) -> ViTConfig:
    width, _, patch_size, _ = _dims(shapes, "visual.conv1.weight", 4)
    return ViTConfig(
        image_size=_grid(shapes, "visual.positional_embedding") * patch_size,
        patch_size=patch_size,
        width=width,
        layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight"),
        heads=width // CHANNELS_PER_HEAD if width % CHANNELS_PER_HEAD == 0 else 1,
        mlp_ratio=_dims(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / width,
    )


def _infer_resnet(shapes: Shapes) -> ResNetConfig:
    one, two, three, four = (_count(shapes, rf"visual\.layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
    return ResNetConfig(
        image_size=_grid(shapes, "visual.attnpool.positional_embedding") * 32,
        layers=(one, two, three, four),
        width=_dims(shapes, "visual.conv3.weight", 4)[0],
    )


def _same_sizes(config: CLIPConfig) -> tuple[str, CLIPConfig] | None:
    """The preset that differs in nothing the weights would show, and `config` with its heads."""
    for name, preset in PRESETS.items():
        if (_sizes(preset.vision), _sizes(preset.text)) == (_sizes(config.vision), _sizes(config.text)):
            vision = replace(preset.vision, image_size=config.vision.image_size)
            heads = preset.text.heads if isinstance(preset.text, TextConfig) else None
            return name, replace(config, vision=vision, text=replace(config.text, heads=heads))
    return None


def _sizes(tower: ViTConfig | ResNetConfig | TextConfig | TimmConfig | TransformersTextConfig) -> tuple[object, ...]:
    """The architecture of a tower, without what surgery changes and what the weights do not show."""
    left_out = ("heads", "image_size", "context_length", "vocab_size")
    return type(tower), *((f.name, getattr(tower, f.name)) for f in fields(tower) if f.name not in left_out)


def _dims(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    shape = shapes[name]
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)[:8]}")
    return shape


def _count(shapes: Shapes, pattern: str) -> int:
    """Count blocks, numbered from 0 without a gap."""
    numbers = {int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name)) and len(match[1]) < 6}
    if not numbers or max(numbers) + 1 != len(numbers):
        raise ValueError(f"its blocks ({pattern}) are not numbered 0, 1, 2, ...")
    return len(numbers)


def _grid(shapes: Shapes, name: str) -> int:
    """Side of the square of positions, the class token's left out."""
    places = _dims(shapes, name, 2)[0] - 1
    if isqrt(places) ** 2 != places:
        raise ValueError(f"{name} has {places} places, which are no square")
    return isqrt(places)


_DESCRIBED = "which only the open_clip_config.json beside it describes"
_OTHER_FAMILIES = {
    "visual.trunk.": f"its image tower is a timm model, {_DESCRIBED}",
    "text.proj.": f"its text tower is a Hugging Face model, {_DESCRIBED}",
    "text.transformer.embeddings.": f"its text tower is a Hugging Face model, {_DESCRIBED}",
    "text.transformer.encoder.": f"its text tower is a Hugging Face model, {_DESCRIBED}",
    "text.text_decoder.": "it has a caption decoder (CoCa)",
    "text_decoder.": "it has a caption decoder (CoCa)",
    "text.cls_emb": "its text tower has a class token (CoCa)",
    "visual.attn_pool": "its image tower pools by attention (CoCa, SigLIP)",
}


def _refuse_other_families(shapes: Shapes, where: Path) -> None:
    for prefix, reason in _OTHER_FAMILIES.items():
        if any(name.startswith(prefix) for name in shapes):
            raise CheckpointError(f"{where} is not of the CLIP family that diptych knows: {reason}")
    if any(".ls_1.gamma" in name for name in shapes):
        raise CheckpointError(f"{where} is not of the CLIP family that diptych knows: its blocks have layer scale")
