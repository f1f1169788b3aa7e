"""Transformer blocks in 8 bits: each output of a linear layer has a scale, each token has its own, found as it comes.

    y = (round(x / s) @ round(W / t)) * s * t + bias         s = max|x| / 127 of a token, t = max|W| / 127 of an output

Nothing is calibrated, so a feature does not depend on what was seen before. Sums are exact in 32 bits; attention, the
residual stream and LayerNorm are not quantised. What stands between two products is one compiled function.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.errors import UsageError
from diptych.model import operators
from diptych.model.config import Activation
from diptych.model.inference.compiled import compile_rows
from diptych.model.transformer import ACTIVATIONS, ResidualAttentionBlock

LEVELS = 127
_ZERO = 128
"""What stands for zero: oneDNN multiplies unsigned rows by signed weights."""
_TINY = 1e-12
"""Keeps the scale of a token of zeros from being zero."""

Rows = tuple[UInt8[Tensor, "R K"], Float[Tensor, "R 1"]]
"""Quantised rows and the scale of each."""


def check_processor(device: torch.device) -> None:
    """Raise UsageError where 8-bit products are missing, slow or saturate."""
    has = torch.cpu.get_capabilities()
    if device.type != "cpu" or not (has.get("avx512_vnni") or has.get("amx_int8") or has.get("avx_vnni")):
        raise UsageError(
            f"int8 needs a processor with VNNI or AMX, which {device} is not; choose bfloat16 or float32, or auto"
        )
    if not operators.HAS_INT8:
        raise UsageError(
            f"PyTorch {torch.__version__} has no int8 that is known here; choose bfloat16, float32 or auto"
        )


class Int8Linear(NamedTuple):
    """A linear layer whose weight lies as oneDNN multiplies it."""

    packed: Tensor
    scale: Float[Tensor, " M"]
    zero: Tensor
    """Zero point of each output's weights: 0."""
    bias: Float[Tensor, " M"]

    def multiply(self, rows: UInt8[Tensor, "R K"], dtype: torch.dtype) -> Float[Tensor, "R M"]:
        """The product without the scale of each row and without the bias, which the next function adds."""
        return operators.multiply_int8(rows, _ZERO, self.packed, self.scale, self.zero, dtype)


class Int8Block(NamedTuple):
    """A block's linear layers and norms."""

    ln_1: tuple[Tensor, Tensor]
    in_proj: Int8Linear
    out_proj: Int8Linear
    ln_2: tuple[Tensor, Tensor]
    c_fc: Int8Linear
    c_proj: Int8Linear


@torch.no_grad()
def quantize_block(block: ResidualAttentionBlock) -> Int8Block:
    """Round a block's weights. QuickGELU's factors move into the scales around it: silu(1.702 x) / 1.702."""
    c_fc, c_proj = quantize(block.mlp.c_fc), quantize(block.mlp.c_proj)
    if name_activation(block) == "quick_gelu":
        c_fc = c_fc._replace(scale=c_fc.scale * 1.702, bias=c_fc.bias * 1.702)
        c_proj = c_proj._replace(scale=c_proj.scale / 1.702)
    ln_1, ln_2 = ((norm.weight.detach().clone(), norm.bias.detach().clone()) for norm in (block.ln_1, block.ln_2))
    return Int8Block(ln_1, quantize(block.attn.in_proj), quantize(block.attn.out_proj), ln_2, c_fc, c_proj)


def name_activation(block: ResidualAttentionBlock) -> Activation:
    """The name of a block's activation."""
    return next(name for name, kind in ACTIVATIONS.items() if type(block.mlp.gelu) is kind)


def quantize(linear: nn.Linear) -> Int8Linear:
    """Round a weight [M, K] to 8 bits, each output by its own scale."""
    weight = linear.weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=_TINY) / LEVELS
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    packed = operators.pack_int8(rounded)
    return Int8Linear(packed, scale, torch.zeros(len(scale), dtype=torch.int64), linear.bias.detach().float().clone())


def quantize_rows(x: Float[Tensor, "R K"]) -> Rows:
    """Round each row by its own scale."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY) * (1 / LEVELS)
    return ((x * (1 / scale)).round() + _ZERO).to(torch.uint8), scale


def norm(x: Float[Tensor, "R D"], weight: Float[Tensor, " D"], bias: Float[Tensor, " D"], eps: float) -> Rows:
    """LayerNorm, quantised."""
    return quantize_rows(F.layer_norm(x, (x.shape[1],), weight, bias, eps))


def add_norm(
    x: Float[Tensor, "R D"],
    product: Float[Tensor, "R D"],
    scale: Float[Tensor, "R 1"],
    bias: Float[Tensor, " D"],
    norm_weight: Float[Tensor, " D"],
    norm_bias: Float[Tensor, " D"],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream with a product added to it, and its LayerNorm, quantised."""
    x = x + product.float() * scale + bias
    return x, *norm(x, norm_weight, norm_bias, eps)


def rescale(
    product: Float[Tensor, "R M"], scale: Float[Tensor, "R 1"], bias: Float[Tensor, " M"]
) -> Float[Tensor, "R M"]:
    """A product as what it stands for."""
    return (product.float() * scale + bias).to(product.dtype)


def activate(
    product: Float[Tensor, "R M"], scale: Float[Tensor, "R 1"], bias: Float[Tensor, " M"], activation: Activation
) -> Rows:
    """The activation of a product, quantised; `quantize_block` has moved QuickGELU's factors.

    Below zero all of them stay above a small bound and above it they grow, so the largest magnitude of a row is found
    without computing the activation twice.
    """
    h = product.float() * scale + bias
    if activation == "quick_gelu":
        function, lowest = F.silu, 0.27847
    elif activation == "gelu":
        function, lowest = F.gelu, 0.16998
    else:
        function, lowest = partial(F.gelu, approximate="tanh"), 0.17005
    scale = function(h.amax(dim=-1, keepdim=True)).clamp(min=lowest) * (1 / LEVELS)
    return ((function(h) * (1 / scale)).round() + _ZERO).to(torch.uint8), scale


class Int8Transformer:
    """The blocks of an image tower; of the last one some tokens alone are computed.

    `attend(qkv [N, L, 3 D], heads, read)` is the attention of the first `read` tokens over all.
    """

    def __init__(
        self,
        blocks: list[ResidualAttentionBlock],
        dtype: torch.dtype,
        read: int,
        attend: Callable[[Tensor, int, int], Tensor],
    ) -> None:
        self.blocks = [quantize_block(block) for block in blocks]
        self.heads = blocks[0].attn.heads
        self.activation: Activation = name_activation(blocks[0])
        self.eps = blocks[0].ln_1.eps
        self.dtype, self.read, self.attend = dtype, read, attend
        width, mlp_width = blocks[0].mlp.c_proj.out_features, blocks[0].mlp.c_proj.in_features
        x, scale, one = torch.zeros(64, width), torch.ones(64, 1), torch.ones(width)
        wide, half, qkv = (torch.zeros(64, size, dtype=dtype) for size in (mlp_width, width, 3 * width))
        self.norm = compile_rows(norm, [x, one, one, self.eps])
        self.add_norm = compile_rows(add_norm, [x, half, scale, one, one, one, self.eps])
        self.rescale = compile_rows(rescale, [qkv, scale, torch.ones(3 * width)])
        self.quantize_rows = compile_rows(quantize_rows, [half])
        self.activate = compile_rows(activate, [wide, scale, torch.ones(mlp_width), self.activation])

    def __call__(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N read D"]:
        n, length, width = x.shape
        x = x.reshape(-1, width)  # [N * L, D]
        rows, scale = self.norm(x, *self.blocks[0].ln_1, self.eps)
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            qkv = self.rescale(block.in_proj.multiply(rows, self.dtype), scale, block.in_proj.bias)
            read = length if following else self.read
            attended = self.attend(qkv.view(n, length, -1), self.heads, read).reshape(-1, width)
            x = x if following else x.view(n, length, width)[:, :read].reshape(-1, width)
            rows, scale = self.quantize_rows(attended)
            product = block.out_proj.multiply(rows, self.dtype)
            x, rows, scale = self.add_norm(x, product, scale, block.out_proj.bias, *block.ln_2, self.eps)
            rows, scale = self.activate(block.c_fc.multiply(rows, self.dtype), scale, block.c_fc.bias, self.activation)
            product = block.c_proj.multiply(rows, self.dtype)
            if following is not None:
                x, rows, scale = self.add_norm(x, product, scale, block.c_proj.bias, *following.ln_1, self.eps)
            else:
                x = x + product.float() * scale + block.c_proj.bias
        return x.view(n, self.read, width)
