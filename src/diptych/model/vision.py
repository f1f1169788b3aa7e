"""The Vision Transformer image tower (paper section 2.4, Table 20), and what later models changed in it.

SigLIP, CLIPA, PE, MobileCLIP-B and CoCa are this tower with other values in its config: another stem, no class token,
rotary positions, another pool. What a config leaves out is not there, and costs nothing.
"""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.model.config import Activation, ViTConfig
from diptych.model.pooling import LatentPool, QueryPool
from diptych.model.transformer import Sight, Transformer, Turns


class VisionTransformer(nn.Module):
    """Pictures [N, 3, H, W] -> image features [N, E], not normalised."""

    def __init__(self, config: ViTConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        width, activation = config.width, config.activation or activation
        self.config = config
        self.image_size = config.image_size
        self.conv1 = build_stem(config)
        self.class_embedding = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.positional_embedding = nn.Parameter(torch.empty(config.positions, width))
        self.ln_pre = nn.LayerNorm(width, config.norm_eps) if config.ln_pre else nn.Identity()
        self.transformer = Transformer(config, activation)
        self.pooled_width = embed_dim if config.pool == "queries" else width
        self.ln_post = nn.LayerNorm(self.pooled_width, config.norm_eps)
        match config.pool:
            case "latent":
                self.attn_pool = LatentPool(config, activation)
            case "queries":
                self.attn_pool = QueryPool(config, embed_dim)
            case _:
                self.attn_pool = None
        has_matrix = config.projection != "none"
        self.proj = nn.Parameter(torch.empty(self.pooled_width, embed_dim)) if has_matrix else None
        self.proj_bias = nn.Parameter(torch.empty(embed_dim)) if config.projection == "linear" else None
        self.reset_parameters()

    def forward(
        self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N E"]:
        """`patches` names the K patches of each picture that are seen; by default all are (FLIP, Li et al. 2023)."""
        return self.project(self.pool(image, patches))

    def project(self, pooled: Float[Tensor, "N P"]) -> Float[Tensor, "N E"]:
        """What was pooled -> features, in its type."""
        if self.proj is not None:
            pooled = pooled @ self.proj.to(pooled.dtype)
        return pooled if self.proj_bias is None else pooled + self.proj_bias.to(pooled.dtype)

    def pool(self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None) -> Float[Tensor, "N P"]:
        """What is projected: the features that the paper's linear probes are trained on (Appendix A.3). P is D, but for
        CoCa's pool, which is as wide as the joint space."""
        x = self.embed_patches(image, patches)
        reads_one = self.config.pool == "class"
        token = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if reads_one else None
        return self.pool_tokens(self.transformer(x, token, Sight(turns=self.get_turns(patches, x.device))))

    def pool_tokens(self, x: Float[Tensor, "N *L D"]) -> Float[Tensor, "N P"]:
        """The last block's output, of the class token alone where that is what is read -> one vector a picture."""
        match self.config.pool:
            case "class":
                return self.ln_post(x)
            case "mean":
                return self.ln_post(x[:, int(self.config.class_token) :].mean(dim=1))
            case "latent":
                assert self.attn_pool is not None
                return self.attn_pool(self.ln_post(x))
            case "queries":
                assert self.attn_pool is not None
                return self.ln_post(self.attn_pool(x))

    def embed_patches(
        self, image: Float[Tensor, "N 3 H W"], patches: Int[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N L D"]:
        """What the blocks begin with: the class token, then the patches that are seen, each with its position."""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [N, D, g, g] -> [N, g * g, D]
        positions = self.positional_embedding
        x = x + positions[-x.shape[1] :]
        if patches is not None:
            x = x.gather(1, patches.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [N, K, D]
        if self.class_embedding is not None:
            first = self.class_embedding
            if self.config.class_position:
                first = first + positions[0]
            x = torch.cat([first.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # [N, K + 1, D]
        return self.ln_pre(x)

    def get_turns(self, patches: Int[Tensor, "N K"] | None, device: torch.device) -> Turns | None:
        """Rotary positions of the class token and of the patches that are seen."""
        if self.config.rotary_grid is None:
            return None
        cos, sin = build_turns(self.config, device)
        if patches is None:
            return cos, sin
        rows = patches + self.config.class_token
        if self.config.class_token:
            rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
        return cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """OpenAI's initialisation: N(0, 1 / width) where named, PyTorch's attention default in the blocks."""
        std = self.config.width**-0.5
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            if parameter is not None:
                nn.init.normal_(parameter, std=std)
        if self.attn_pool is not None:
            self.attn_pool.reset_parameters()
        if self.proj_bias is not None:
            nn.init.zeros_(self.proj_bias)
        for block in self.transformer.blocks():  # as nn.MultiheadAttention, which OpenAI's code uses
            nn.init.xavier_uniform_(block.attn.in_proj.weight)
            nn.init.zeros_(block.attn.in_proj.bias)
            nn.init.zeros_(block.attn.out_proj.bias)


TEMPERATURE = 10_000.0
"""The slowest pair of channels turns once in 2 pi times as many patches."""


def build_turns(config: ViTConfig, device: torch.device) -> Turns:
    """Cosine and sine of each token's angles [L, D / A], float32: column, then row, each channel pair at its own speed.

    A picture with another grid is turned as if it had been stretched to the one that was trained on.
    """
    assert config.rotary_grid is not None
    bands = config.width // config.heads // 4
    speeds = TEMPERATURE ** (-torch.arange(bands, device=device, dtype=torch.float32) / bands)
    places = torch.arange(config.grid, device=device, dtype=torch.float32) + config.rotary_start
    places = places / config.grid * config.rotary_grid
    column, row = places.repeat(config.grid), places.repeat_interleave(config.grid)
    angles = torch.cat([column[:, None] * speeds, row[:, None] * speeds], dim=1).repeat_interleave(2, dim=1)
    if config.class_token:
        angles = torch.cat([angles.new_zeros(1, angles.shape[1]), angles])
    return angles.cos(), angles.sin()


def build_stem(config: ViTConfig) -> nn.Module:
    """Build the map from pixels [N, 3, H, W] to patch tokens [N, D, H / patch_size, W / patch_size]."""
    width = config.width
    if config.stem in ("patch", "patch_bias"):
        return nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.stem == "patch_bias")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if config.stem == "mobile":
        for i, (before, after, side) in enumerate(((3, width // 4, 4), (width // 4, width // 4, 2)), start=1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, side, side, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(after)
            layers[f"gelu{i}"] = nn.GELU()
        layers["project"] = nn.Conv2d(width // 4, width, 2, 2)
        return nn.Sequential(layers)
    halvings = int(math.log2(config.patch_size))
    channels = [3, *(width // 2**i for i in reversed(range(halvings)))]
    for i, (before, after) in enumerate(pairwise(channels), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers[f"norm{i}"] = nn.GroupNorm(1, after)  # no batch statistics: a picture's feature depends on it alone
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    layers["project"] = nn.Conv2d(width, width, 1, bias=False)
    return nn.Sequential(layers)
