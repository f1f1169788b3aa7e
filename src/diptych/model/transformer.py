"""The Transformer block that both towers share (paper section 2.4).

Shapes: N pairs in the batch, L tokens, D width, A heads.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diptych.model.config import Activation, TextConfig, ViTConfig
from diptych.model.operators import silu_backward, softmax_backward


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's weights were trained with.

    Computed as silu(1.702 x) / 1.702, the same function.
    """

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if torch.compiler.is_compiling():  # it fuses the plain form, and writes it to ONNX
            return F.silu(1.702 * x) / 1.702
        return _QuickGELU.apply(x)  # pyright: ignore[reportReturnType]


class _QuickGELU(torch.autograd.Function):
    """The derivative is silu's at 1.702 x: both factors cancel. Autograd would make three more tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = 1.702 * x
        if not ctx.needs_input_grad[0]:
            return F.silu(scaled, inplace=True).div_(1.702)
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, derivative: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scaled,) = ctx.saved_tensors
        return silu_backward(derivative, scaled)


class TanhGELU(nn.GELU):
    """GELU by its approximation with a hyperbolic tangent, which SigLIP 2 was trained with."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU, "gelu_tanh": TanhGELU}

Turns = tuple[Float[Tensor, "... L D2"], Float[Tensor, "... L D2"]]
"""Cosine and sine by which rotary positions turn each pair of channels of a head; D2 = D / A."""


class Sight(NamedTuple):
    """What the tokens of a batch see of each other in attention, and where they stand."""

    is_causal: bool = False
    """Each sees itself and what stands before it."""
    mask: Bool[Tensor, "N 1 L L"] | None = None
    """True where a token (row) sees another; in place of `is_causal`."""
    turns: Turns | None = None


def turn(x: "Heads", turns: Turns) -> "Heads":
    """Rotate each pair of channels by its token's angle (Su et al. 2021)."""
    cos, sin = turns
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention.

    `in_proj` is one Linear of 3 D outputs, in the order query, key, value, so that adapters can target it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N L D"], sight: Sight) -> Float[Tensor, "N L D"]:
        q, k, v = self.project(x, sight.turns)
        if sight.mask is None:
            return self.out_proj(_join_heads(attend(q, k, v, sight.is_causal)))
        return self.out_proj(_join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask)))

    def read(self, x: Float[Tensor, "N L D"], token: Int[Tensor, " N"], sight: Sight) -> Float[Tensor, "N D"]:
        """The output at one token of each row: one query instead of L."""
        n, length, _ = x.shape
        q, k, v = self.project(x, sight.turns)
        rows = torch.arange(n, device=x.device)
        q = q[rows, :, token].unsqueeze(2)  # [N, A, 1, D / A]
        seen = None
        if sight.mask is not None:
            seen = sight.mask[rows, :, token].unsqueeze(2)
        elif sight.is_causal:
            seen = (torch.arange(length, device=x.device) <= token[:, None])[:, None, None]
        return self.out_proj(_join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)).squeeze(1))

    def project(self, x: Float[Tensor, "N L D"], turns: Turns | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [N, A, L, D / A]; the first two turned by their positions."""
        n, length, width = x.shape
        qkv = self.in_proj(x).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (q, k, v) if turns is None else (turn(q, turns), turn(k, turns), v)


Heads = Float[Tensor, "N A L D2"]
"""Queries, keys or values of the heads; D2 = D / A."""


def attend(q: Heads, k: Heads, v: Heads, is_causal: bool) -> Heads:
    """softmax(q k^T / sqrt(D2)) v."""
    is_half_on_cpu = q.device.type == "cpu" and q.dtype.itemsize == 2
    if is_half_on_cpu and q.requires_grad and not torch.compiler.is_exporting():
        return _KeptAttention.apply(q, k, v, is_causal)  # pyright: ignore[reportReturnType]
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


class _KeptAttention(torch.autograd.Function):
    """Attention that keeps its probabilities [N, A, L, L] for the derivative.

    PyTorch's flash kernel computes them anew, which on a processor in 16 bits takes five times as long at 50 tokens.
    Scores and their softmax are float32, as the kernel's are; probabilities are kept in 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length, width = q.shape[2:]
        scores = (q.float() * width**-0.5) @ k.float().transpose(2, 3)
        if is_causal:
            scores += torch.full((length, length), -torch.inf).triu(1)
        p = scores.softmax(dim=-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, derivative: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, p = ctx.saved_tensors
        by_scores = softmax_backward(derivative @ v.transpose(2, 3), p) * q.shape[3] ** -0.5
        return by_scores @ k, by_scores.transpose(2, 3) @ q, p.transpose(2, 3) @ derivative, None


def _join_heads(x: Float[Tensor, "N A L D2"]) -> Float[Tensor, "N L D"]:
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """D -> mlp_width -> D; the paper's mlp_width is 4 D."""

    def __init__(self, width: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, mlp_width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(mlp_width, width)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens D"]:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: ViTConfig | TextConfig, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, activation)

    def forward(self, x: Float[Tensor, "N L D"], sight: Sight) -> Float[Tensor, "N L D"]:
        x = x + self.attn(self.ln_1(x), sight)
        return x + self.mlp(self.ln_2(x))

    def read(self, x: Float[Tensor, "N L D"], token: Int[Tensor, " N"], sight: Sight) -> Float[Tensor, "N D"]:
        """`forward` at one token of each row, computed for that token alone."""
        one = x[torch.arange(x.shape[0], device=x.device), token] + self.attn.read(self.ln_1(x), token, sight)
        return one + self.mlp(self.ln_2(one))


class Transformer(nn.Module):
    """A stack of blocks, of whose output one token a row is read, or all of them."""

    def __init__(self, config: ViTConfig | TextConfig, activation: Activation) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(config, activation) for _ in range(config.layers))

    def forward(
        self, x: Float[Tensor, "N L D"], token: Int[Tensor, " N"] | None, sight: Sight
    ) -> Float[Tensor, "N *L D"]:
        """[N, L, D], or with `token` that one of each row [N, D]: then the last block computes it alone, as its other
        outputs would be thrown away."""
        *blocks, last = self.blocks()
        for block in blocks:
            x = block(x, sight)
        return last(x, sight) if token is None else last.read(x, token, sight)

    def blocks(self) -> list[ResidualAttentionBlock]:
        """The blocks with their type, which nn.ModuleList does not keep."""
        return [block for block in self.resblocks if isinstance(block, ResidualAttentionBlock)]
