"""The image towers as a processor computes them fastest: bytes of pixels in, features out.

Pixels 0..255 are whole numbers that bfloat16 holds exactly; normalisation is part of the first layer's weights. The
residual stream stays float32. `tests/model/test_quick_vision.py` holds every tower against the one it was made from.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diptych.errors import UsageError
from diptych.model.int8 import Int8Transformer, check_processor
from diptych.model.precision import PackedLinear, Resolved, can_pack, has_fast_bfloat16, to_bfloat16
from diptych.model.resnet import ModifiedResNet
from diptych.model.vision import VisionTransformer

Encode = Callable[[UInt8[Tensor, "N 3 H W"]], Float[Tensor, "N D"]]
"""Pixels to a ViT's features before their projection, to a ResNet's features."""
READ = 2
"""Tokens that the last block computes: the class token, and one more since the compiler makes one row a case apart."""
LONG = 128
"""Tokens from which PyTorch's fused attention is faster than three plain products."""


@torch.no_grad()
def build_encoder(visual: nn.Module, precision: Resolved, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """Build the function from pixels to features before the projection, float32, in a precision.

    `mean` and `std` are the preprocessing's, of pixels from 0 to 1.
    """
    device = next(visual.parameters()).device
    if precision == "int8":
        check_processor(device)
        if not isinstance(visual, VisionTransformer):
            raise UsageError("int8 is for Vision Transformers; choose bfloat16 or float32 for a ResNet, or auto")
    normalize = _Normalize(mean, std, device)
    if precision in ("exact", "float32") or next(visual.parameters()).dtype != torch.float32:
        dtype = next(visual.parameters()).dtype
        pool = visual.pool if isinstance(visual, VisionTransformer) else visual
        return lambda pixels: pool(normalize(pixels.to(device)).to(dtype)).float()
    if device.type == "cpu" and isinstance(visual, VisionTransformer):
        return _QuickViT(visual, precision, normalize)
    if isinstance(visual, ModifiedResNet):
        visual = _fuse_resnet(visual)
    lowered = copy.deepcopy(visual).eval().requires_grad_(False).to(torch.bfloat16)
    lowered.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pool = lowered.pool if isinstance(lowered, VisionTransformer) else lowered
    return lambda pixels: pool(
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
    """A Vision Transformer in bfloat16 or int8 on a CPU."""

    def __init__(self, visual: VisionTransformer, precision: Resolved, normalize: _Normalize) -> None:
        self.visual = visual
        blocks = visual.transformer.blocks()
        self.dtype = (
            torch.bfloat16 if precision == "bfloat16" or has_fast_bfloat16(torch.device("cpu")) else torch.float32
        )
        self.embed = _PatchEmbedding(visual, normalize, self.dtype)
        if precision == "int8":
            self.run: Callable[[Tensor], Tensor] = Int8Transformer(blocks, self.dtype, READ, attend)
        else:
            self.run = self._run_bfloat16
            self.blocks = [to_bfloat16(block) for block in blocks]

    def __call__(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        return self.visual.ln_post(self.run(self.embed(pixels))[:, 0])

    def _run_bfloat16(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N R D"]:
        for i, block in enumerate(self.blocks, start=1):
            read = READ if i == len(self.blocks) else x.shape[1]
            attended = attend(block.attn.in_proj(block.ln_1(x).bfloat16()), block.attn.heads, read)
            x = x[:, :read] + block.attn.out_proj(attended)
            x.add_(block.mlp(block.ln_2(x).bfloat16()))
        return x


def attend(qkv: Float[Tensor, "N L D3"], heads: int, read: int) -> Float[Tensor, "N R D"]:
    """Attention of the first `read` tokens over all. Scores are rounded as their factors are, the softmax is not."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [N, A, L, D / A]
    q = q[:, :, :read]
    if qkv.shape[1] < LONG:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        attended = scores.float().softmax(dim=-1).to(qkv.dtype) @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


class _PatchEmbedding:
    """Pixels -> what the blocks begin with. Patches do not overlap, so their convolution is one product."""

    def __init__(self, visual: VisionTransformer, normalize: _Normalize, dtype: torch.dtype) -> None:
        self.visual, self.normalize, self.dtype = visual, normalize, dtype
        self.product: Callable[[Tensor], Tensor] | None = None
        if isinstance(visual.conv1, nn.Conv2d):
            self.patch = visual.conv1.kernel_size[0]
            weight = visual.conv1.weight.detach()  # [D, 3, p, p]
            bias = torch.einsum("dcij,c->d", weight, normalize.shift)
            weight = (weight * normalize.scale.view(3, 1, 1)).flatten(1)
            if dtype == torch.bfloat16 and can_pack():
                self.product = PackedLinear(weight, bias)
            else:
                weight, bias = weight.to(dtype), bias.to(dtype)
                self.product = lambda patches: F.linear(patches, weight, bias)
            self.first = (visual.class_embedding + visual.positional_embedding[0]).detach()
            self.positions = visual.positional_embedding[1:].detach()

    def __call__(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"]:
        if self.product is None:  # a stem of several convolutions
            return self.visual.embed_patches(self.normalize(pixels))
        n, _, height, width = pixels.shape
        p = self.patch
        patches = pixels.view(n, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, 3 * p * p).to(self.dtype)  # the bytes are moved, then widened
        x = torch.empty(n, 1 + len(self.positions), len(self.first))
        x[:, 0] = self.first
        torch.add(self.product(patches).view(n, len(self.positions), -1), self.positions, out=x[:, 1:])
        return self.visual.ln_pre(x)


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
