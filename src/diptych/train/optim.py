"""AdamW as in the paper's Table 18, and the learning rate as a function of the step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.model.clip import CLIP
from diptych.model.config import ViTConfig
from diptych.train.config import OptimConfig
from diptych.train.parallel.wrap import fill_tensor, full

_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate after `step` finished updates: linear up over `warmup`, then half a cosine down to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Named parameters that are decayed, and those that are not: gains, biases and the temperature."""
    decayed, kept = {}, {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_gain = isinstance(module, _NORMS) or (parameter.ndim == 1 and name.endswith(("weight", "gamma")))
            is_gain_or_bias = is_gain or name.endswith(("bias", "logit_scale"))
            (kept if is_gain_or_bias else decayed)[name] = parameter
    return decayed, kept


def build_optimizer(
    model: CLIP, config: OptimConfig, lr_scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer; `beta2` and `eps` follow the image tower's family unless they are given.

    `lr_scales` gives weights, by name, their share of the learning rate, and leaves out those that are not in it.
    """
    is_vit = isinstance(model.config.vision, ViTConfig)
    beta2 = config.beta2 if config.beta2 is not None else (0.98 if is_vit else 0.999)
    eps = config.eps if config.eps is not None else (1e-6 if is_vit else 1e-8)
    decayed, kept = split_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    if lr_scales is not None:
        groups = [
            {"params": params, "weight_decay": decay, "lr_scale": scale}
            for scale in sorted(set(lr_scales.values()), reverse=True)
            for named, decay in ((decayed, config.weight_decay), (kept, 0.0))
            if (params := [p for name, p in named.items() if lr_scales.get(name) == scale])
        ]
    if config.half_statistics:
        return HalfAdamW(groups, lr=config.lr, betas=(config.beta1, beta2), eps=eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, beta2), eps=eps, fused=True)


class HalfAdamW(torch.optim.Optimizer):
    """AdamW whose statistics are kept in 16 bits (paper section 2.5, after Dhariwal et al. 2020).

    Each tensor is stored as float16 times one float32 scale, its largest entry. Of the second moment the root is
    stored: that halves the range it spans. The arithmetic of a step is float32.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            for kind in ("exp_avg", "exp_avg_root"):
                state[kind] = torch.zeros_like(parameter, dtype=torch.float16)
                state[f"{kind}_scale"] = torch.zeros((), device=parameter.device)
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        mean = (state["exp_avg"].float() * state["exp_avg_scale"]).lerp_(gradient, 1 - beta1)
        square = (state["exp_avg_root"].float() * state["exp_avg_root_scale"]).square_()
        root = square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (root / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
        for kind, value in (("exp_avg", mean), ("exp_avg_root", root)):
            scale = full(value.abs().max()).clamp_(min=torch.finfo(torch.float32).tiny)
            state[f"{kind}_scale"] = scale
            state[kind].copy_(value.div_(scale))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: CLIP) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `exp_avg.visual.conv1.weight`, ...; cut over ranks as the parameters."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: CLIP, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    kinds = {name.partition(".")[0] for name in tensors if name.endswith(".logit_scale")}
    for name, parameter in model.named_parameters():
        for kind in sorted(kinds):
            if (value := tensors.get(f"{kind}.{name}")) is None:
                continue
            if value.shape == parameter.shape and (value.ndim or kind in ("exp_avg", "exp_avg_sq")):
                # A copy on the parameter's device, laid out as the parameter: fused kernels pair elements by layout.
                state = torch.empty_like(parameter, dtype=value.dtype).detach()
                fill_tensor(state, value)
                optimizer.state[parameter][kind] = state
            else:
                optimizer.state[parameter][kind] = value.to(parameter.device if kind != "step" else "cpu", copy=True)
        step = tensors.get(f"step.{name}")
        if isinstance(optimizer, torch.optim.AdamW) and step is not None:  # the fused kernel counts on the device
            optimizer.state[parameter]["step"] = step.to(parameter.device, copy=True)
