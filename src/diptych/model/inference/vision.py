"""The image towers as a processor computes them fastest: bytes of pixels in, features out.

Pixels 0..255 are whole numbers that bfloat16 holds exactly; normalisation is part of the first layer's weights. The
residual stream stays float32. `tests/model/test_quick_vision.py` holds every tower against the one it was made from.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diptych.errors import UsageError
from diptych.model.clip import ImageTower
from diptych.model.inference.int8 import Int8Transformer, check_processor
from diptych.model.inference.precision import (
    PackedLinear,
    Resolved,
    has_fast_bfloat16,
    lower_block,
    make_once,
)
from diptych.model.operators import can_pack
from diptych.model.resnet import ModifiedResNet
from diptych.model.transformer import Turns, turn
from diptych.model.vision import VisionTransformer

Encode = Callable[[UInt8[Tensor, "N 3 H W"]], Float[Tensor, "N D"]]
"""Pixels to a ViT's features before their projection, to a ResNet's features."""
READ = 2
"""Tokens that the last block computes for the class token: that, and one more since the compiler makes one row a case
apart."""
LONG = 128
"""Tokens from which PyTorch's fused attention is faster than three plain products."""


def get_encoder(visual: ImageTower, precision: Resolved, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """The function from pixels to features before the projection, float32, in a precision.

    `mean` and `std` are the preprocessing's, of pixels from 0 to 1. Weights are converted once, and again when they
    have changed. Raises UsageError for int8 where there is none.
    """
    own = next(visual.parameters())
    normalize = _Normalize(mean, std, own.device)
    if precision == "int8":
        check_processor(own.device)
        if not isinstance(visual, VisionTransformer):
            raise UsageError("int8 is for Vision Transformers; choose bfloat16 or float32 for this tower, or auto")
    is_quick = own.device.type == "cpu" and isinstance(visual, VisionTransformer)
    if precision == "exact" or own.dtype != torch.float32 or (precision == "float32" and not is_quick):
        return lambda pixels: visual.pool(normalize(pixels.to(own.device)).to(own.dtype)).float()
    return make_once(visual, (precision, tuple(mean), tuple(std)), lambda: _convert(visual, precision, normalize))


@torch.no_grad()
def _convert(visual: ImageTower, precision: Resolved, normalize: "_Normalize") -> Encode:
    """Copies of the weights in a precision. What is returned must not hold the tower, which it is kept with."""
    device = next(visual.parameters()).device
    if device.type == "cpu" and isinstance(visual, VisionTransformer):
        return _QuickViT(visual, precision, normalize)
    lowered = _fuse_resnet(visual) if isinstance(visual, ModifiedResNet) else copy.deepcopy(visual)
    lowered = lowered.eval().requires_grad_(False).to(torch.bfloat16)
    lowered.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return lambda pixels: lowered.pool(
        normalize(pixels.to(device)).to(torch.bfloat16, memory_format=torch.channels_last)
    ).float()


class _Normalize:
    """Bytes -> normalised float32, as one multiplication and one addition."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        std_ = torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * std_)).float().to(device)
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / std_).float().to(device)

    def __call__(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        return torch.addcmul(self.shift.view(3, 1, 1), pixels.float(), self.scale.view(3, 1, 1))


class _QuickViT:
    """A Vision Transformer on a CPU, in any precision but exact."""

    def __init__(self, visual: VisionTransformer, precision: Resolved, normalize: _Normalize) -> None:
        blocks = visual.transformer.blocks()
        is_half = precision == "bfloat16" or (precision == "int8" and has_fast_bfloat16(torch.device("cpu")))
        self.dtype = torch.bfloat16 if is_half else torch.float32
        self.embed = _PatchEmbedding(visual, normalize, self.dtype)
        self.reads_one = visual.config.pool == "class"
        read = READ if self.reads_one else visual.config.tokens
        self.pool = _copy_pool(visual)
        turns = visual.get_turns(None, torch.device("cpu"))
        self.attend = attend if turns is None else partial(attend, turns=turns)
        if precision == "int8":
            self.run: Callable[[Tensor], Tensor] = Int8Transformer(blocks, self.dtype, read, self.attend)
        else:
            self.run, self.read = self._run, read
            self.blocks = [lower_block(block, self.dtype) for block in blocks]

    def __call__(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        x = self.run(self.embed(pixels))
        return self.pool(x[:, 0] if self.reads_one else x)

    def _run(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N R D"]:
        for i, block in enumerate(self.blocks, start=1):
            read = self.read if i == len(self.blocks) else x.shape[1]
            attended = self.attend(block.attn.in_proj(block.ln_1(x).to(self.dtype)), block.attn.heads, read)
            x = x[:, :read] + block.attn.out_proj(attended)
            x.add_(block.mlp(block.ln_2(x).to(self.dtype)))
        return x


def _copy_pool(visual: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """What stands behind the blocks, float32, without the tower itself."""
    rest = copy.copy(visual)
    rest._modules = {name: module for name, module in visual._modules.items() if name in ("ln_post", "attn_pool")}
    return copy.deepcopy(rest).eval().requires_grad_(False).pool_tokens


def attend(qkv: Float[Tensor, "N L D3"], heads: int, read: int, turns: Turns | None = None) -> Float[Tensor, "N R D"]:
    """Attention of the first `read` tokens over all. Scores are rounded as their factors are, the softmax is not."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [N, A, L, D / A]
    if turns is not None:
        q, k = turn(q, turns), turn(k, turns)
    q = q[:, :, :read]
    if qkv.dtype == torch.bfloat16 and qkv.shape[1] < LONG:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        attended = scores.float().softmax(dim=-1).to(qkv.dtype) @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


class _PatchEmbedding:
    """Pixels -> what the blocks begin with."""

    def __init__(self, visual: VisionTransformer, normalize: _Normalize, dtype: torch.dtype) -> None:
        self.normalize, self.dtype = normalize, dtype
        self.grid = visual.config.grid
        self.ln_pre = visual.ln_pre
        positions, first = visual.positional_embedding.detach(), visual.class_embedding
        self.first: Tensor | None = None
        if first is not None:
            self.first = first.detach() + (positions[0] if visual.config.class_position else 0)
        self.positions = positions[-(self.grid**2) :]
        self.stem = visual.conv1
        self.product: Callable[[Tensor], Tensor] | None = None
        if isinstance(visual.conv1, nn.Conv2d):
            self.patch = visual.conv1.kernel_size[0]
            weight = visual.conv1.weight.detach()  # [D, 3, p, p]
            bias = torch.einsum("dcij,c->d", weight, normalize.shift)
            if visual.conv1.bias is not None:
                bias += visual.conv1.bias.detach()
            weight = (weight * normalize.scale.view(3, 1, 1)).flatten(1)
            if can_pack(dtype):
                self.product = PackedLinear(weight, bias, dtype)
            else:
                weight, bias = weight.to(dtype), bias.to(dtype)
                self.product = lambda patches: F.linear(patches, weight, bias)

    def __call__(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        if self.product is None:  # several convolutions
            patches = self.stem(self.normalize(pixels)).flatten(2).transpose(1, 2)
        else:
            patches = self.product(self._cut(pixels)).view(len(pixels), len(self.positions), -1)
        if self.first is None:
            return self.ln_pre(torch.add(patches, self.positions))
        x = torch.empty(len(pixels), 1 + len(self.positions), len(self.first))
        x[:, 0] = self.first
        torch.add(patches, self.positions, out=x[:, 1:])
        return self.ln_pre(x)

    def _cut(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "M P"]:
        """Patches do not overlap, so their convolution is one product. The bytes are moved, then widened."""
        g, p = self.grid, self.patch
        patches = pixels[:, :, : g * p, : g * p].unflatten(3, (g, p)).unflatten(2, (g, p)).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, 3 * p * p).to(self.dtype)


def _fuse_resnet(visual: ModifiedResNet) -> ModifiedResNet:
    """A copy whose batch statistics are part of its convolutions; they span more than eight bits can tell apart."""
    visual = copy.deepcopy(visual).eval()
    for module in list(visual.modules()):
        parts = dict(module.named_children())
        for conv_name, norm_name in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            conv, norm = parts.get(conv_name), parts.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return visual
