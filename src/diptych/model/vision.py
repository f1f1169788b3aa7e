"""The Vision Transformer image tower (paper section 2.4, Table 20)."""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.model.config import Activation, ViTConfig
from diptych.model.transformer import Transformer


class VisionTransformer(nn.Module):
    """Pictures [N, 3, H, W] -> image features [N, E], not normalised."""

    def __init__(self, config: ViTConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        width = config.width
        self.image_size = config.image_size
        self.conv1 = build_stem(config)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config, activation, is_causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self.reset_parameters()

    def forward(
        self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N E"]:
        """`patches` names the K patches of each picture that are seen; by default all are (FLIP, Li et al. 2023)."""
        return self.pool(image, patches) @ self.proj

    def pool(self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None) -> Float[Tensor, "N D"]:
        """What is projected: the features that the paper's linear probes are trained on (Appendix A.3)."""
        x = self.embed_patches(image, patches)
        class_tokens = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return self.ln_post(self.transformer(x, class_tokens))

    def embed_patches(
        self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N L D"]:
        """What the blocks begin with: the class token, then the patches that are seen, each with its position."""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [N, D, g, g] -> [N, g * g, D]
        positions = self.positional_embedding
        x = x + positions[1:]
        if patches is not None:
            x = x.gather(1, patches.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [N, K, D]
        class_token = (self.class_embedding + positions[0]).to(x.dtype).expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([class_token, x], dim=1))  # [N, K + 1, D]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """OpenAI's initialisation: N(0, 1 / width) where named, PyTorch's attention default in the blocks."""
        std = self.class_embedding.shape[0] ** -0.5
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=std)
        for block in self.transformer.blocks():  # as nn.MultiheadAttention, which OpenAI's code uses
            nn.init.xavier_uniform_(block.attn.in_proj.weight)
            nn.init.zeros_(block.attn.in_proj.bias)
            nn.init.zeros_(block.attn.out_proj.bias)


def build_stem(config: ViTConfig) -> nn.Module:
    """Build the map from pixels [N, 3, H, W] to patch tokens [N, D, H / patch_size, W / patch_size]."""
    if config.stem == "patch":
        return nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
    halvings = int(math.log2(config.patch_size))
    channels = [3, *(config.width // 2**i for i in reversed(range(halvings)))]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(pairwise(channels), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers[f"norm{i}"] = nn.GroupNorm(1, after)  # no batch statistics: a picture's feature depends on it alone
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    layers["project"] = nn.Conv2d(config.width, config.width, 1, bias=False)
    return nn.Sequential(layers)
