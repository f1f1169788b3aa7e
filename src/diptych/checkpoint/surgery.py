"""Changing a model that is there: resolution, context length, precision.

Only position embeddings depend on how many patches a picture has or how many tokens a text; they are resized as
pictures and curves are. A model so changed works at once and is better for some training (the paper trains its
ViT-L/14 one more epoch at 336 px, Table 20).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.config import Resize, WeightsDtype
from diptych.checkpoint.loaded import Loaded, rebuild
from diptych.errors import UsageError, unknown_name
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, TimmConfig, TransformersTextConfig

MAX_IMAGE_SIZE, MAX_CONTEXT = 8192, 1 << 16
"""Beyond these, positions alone take more memory than the model."""
PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resize_image(loaded: Loaded, image_size: int, resize: Resize = "open_clip") -> Loaded:
    """The same model for pictures of another size, pixels. Also a ResNet's, whose attention pool has positions."""
    if image_size > MAX_IMAGE_SIZE:
        raise UsageError(f"image_size {image_size} is too large; use at most {MAX_IMAGE_SIZE:,} pixels")
    if resize not in get_args(Resize):
        raise unknown_name("way to resize", str(resize), get_args(Resize))
    config = loaded.model.config
    if isinstance(config.vision, TimmConfig):
        raise UsageError(f"pictures of timm's {config.vision.name} have one size, {config.vision.image_size} px")
    vision = replace(config.vision, image_size=image_size)
    config = replace(config, vision=vision)
    name = "visual.attnpool.positional_embedding"
    state = dict(loaded.model.state_dict())
    name = name if name in state else "visual.positional_embedding"
    state[name] = resize_grid(state[name], vision.grid, resize)
    return Loaded(_rebuild(config, state), replace(loaded.preprocess, image_size=image_size), loaded.tokenizer)


def resize_grid(positions: Float[Tensor, "P D"], grid: int, resize: Resize) -> Float[Tensor, "Q D"]:
    """Resize a square of positions to grid * grid; one before it, of the class token or the mean, stays."""
    side = math.isqrt(len(positions))
    first, square = positions.split([len(positions) - side**2, side**2])
    if side == grid:
        return positions
    image = square.float().T.reshape(1, -1, side, side)  # [1, D, g, g]
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=resize == "open_clip")
    return torch.cat([first, image.flatten(2)[0].T.to(positions.dtype)])


def resize_context(loaded: Loaded, context_length: int) -> Loaded:
    """The same model for texts of another length, tokens.

    Shorter: the first positions stay, so the features of texts that fit do not change. Longer: linear interpolation,
    as in OpenCLIP, which moves every position.
    """
    if context_length > MAX_CONTEXT:
        raise UsageError(f"context_length {context_length} is too large; use at most {MAX_CONTEXT:,} tokens")
    config = loaded.model.config
    config = replace(config, text=replace(config.text, context_length=context_length))
    state = dict(loaded.model.state_dict())
    if isinstance(config.text, TransformersTextConfig):  # has positions for more, or none
        tokenizer = loaded.tokenizer.with_context_length(context_length)
        return Loaded(_rebuild(config, state), loaded.preprocess, tokenizer)
    positions = state["text.positional_embedding"]
    before = loaded.model.config.text.context_length
    positions, behind = positions[:before], positions[before:]  # CoCa's class token stands behind the text
    if context_length > len(positions):
        curve = positions.float().T.unsqueeze(0)  # [1, D, L]
        curve = F.interpolate(curve, context_length, mode="linear", align_corners=False)
        positions = curve[0].T.to(positions.dtype)
    state["text.positional_embedding"] = torch.cat([positions[:context_length], behind])
    return Loaded(_rebuild(config, state), loaded.preprocess, loaded.tokenizer.with_context_length(context_length))


def change_precision(loaded: Loaded, precision: WeightsDtype) -> Loaded:
    """The same model with weights of another type, on the CPU in evaluation mode; the two halves round.

    A model that is all of this already is returned as it is.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", str(precision), PRECISIONS)
    model, dtype = loaded.model, PRECISIONS[precision]
    if model.dtype != dtype or model.training or model.logit_scale.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu", dtype).eval()
    return Loaded(model, loaded.preprocess, loaded.tokenizer)


def _rebuild(config: CLIPConfig, state: Mapping[str, Tensor]) -> CLIP:
    """A model of this config that holds copies of these tensors."""
    return rebuild(config, {name: tensor.detach().clone() for name, tensor in state.items()}).eval()
