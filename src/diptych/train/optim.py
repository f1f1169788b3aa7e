"""AdamW as in the paper's Table 18, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from diptych.model.clip import CLIP
from diptych.model.config import ViTConfig
from diptych.train.config import OptimConfig

_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of the update that follows `step` finished ones: linear up over `warmup`, then half a cosine down to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Named parameters that are decayed, and those that are not: gains, biases and the temperature."""
    decayed, kept = {}, {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_gain_or_bias = isinstance(module, _NORMS) or name.endswith(("bias", "logit_scale"))
            (kept if is_gain_or_bias else decayed)[name] = parameter
    return decayed, kept


def build_optimizer(model: CLIP, config: OptimConfig) -> torch.optim.AdamW:
    """Build the optimizer; `beta2` and `eps` follow the image tower's family unless they are given."""
    is_vit = isinstance(model.config.vision, ViTConfig)
    beta2 = config.beta2 if config.beta2 is not None else (0.98 if is_vit else 0.999)
    eps = config.eps if config.eps is not None else (1e-6 if is_vit else 1e-8)
    decayed, kept = split_parameters(model)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, beta2), eps=eps, fused=True)
