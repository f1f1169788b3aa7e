"""timm's Vision Transformers that are our image tower with other values: by name, and where their tensors lie.

OpenCLIP wraps them as `visual.trunk`, and names them in its configs (`timm_model_name`). Sizes are timm's 1.0.31
(timm/models/vision_transformer.py, vision_transformer_hybrid.py, eva.py).
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from diptych.checkpoint.weights.read import Source
from diptych.model.config import ViTConfig


def _siglip(
    patch_size: int,
    image_size: int,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    mlp_ratio: float = 4.0,
    *,
    tanh: bool = False,
) -> ViTConfig:
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=mlp_ratio,
        stem="patch_bias",
        cut_edge=image_size % patch_size > 0,
        class_token=False,
        ln_pre=False,
        norm_eps=1e-6,
        activation="gelu_tanh" if tanh else "gelu",
        pool="latent",
        projection="none",
    )


def _large(patch_size: int, image_size: int, *, tanh: bool = False) -> ViTConfig:
    return _siglip(patch_size, image_size, 1024, 24, 16, tanh=tanh)


def _so400m(patch_size: int, image_size: int, *, tanh: bool = False) -> ViTConfig:
    return _siglip(patch_size, image_size, 1152, 27, 16, 3.7362, tanh=tanh)


def _perception(
    patch_size: int,
    image_size: int,
    width: int,
    layers: int,
    heads: int,
    mlp_ratio: float = 4.0,
    *,
    class_token: bool = True,
) -> ViTConfig:
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_ratio=mlp_ratio,
        class_token=class_token,
        activation="gelu",
        pool="latent",
        pool_heads=8,
        pool_mlp_ratio=4.0,
        rotary_grid=image_size // patch_size,
        rotary_start=float(class_token),
        projection="linear",
    )


VITS: Mapping[str, ViTConfig] = {
    # Zhai et al. 2023, Tschannen et al. 2025
    **{f"vit_base_patch16_siglip_{size}": _siglip(16, size) for size in (224, 256, 384, 512)},
    "vit_base_patch32_siglip_256": _siglip(32, 256, tanh=True),
    **{f"vit_large_patch16_siglip_{size}": _large(16, size, tanh=size == 512) for size in (256, 384, 512)},
    **{f"vit_so400m_patch14_siglip_{size}": _so400m(14, size) for size in (224, 378, 384)},
    **{f"vit_so400m_patch16_siglip_{size}": _so400m(16, size, tanh=True) for size in (256, 384, 512)},
    **{f"vit_giantopt_patch16_siglip_{size}": _siglip(16, size, 1536, 40, 16, tanh=True) for size in (256, 384)},
    # the Perception Encoder (Bolya et al. 2025)
    "vit_pe_core_tiny_patch16_384": _perception(16, 384, 192, 12, 3),
    "vit_pe_core_small_patch16_384": _perception(16, 384, 384, 12, 6),
    "vit_pe_core_base_patch16_224": _perception(16, 224, 768, 12, 12),
    "vit_pe_core_large_patch14_336": _perception(14, 336, 1024, 24, 16),
    "vit_pe_core_gigantic_patch14_448": _perception(14, 448, 1536, 50, 16, 8960 / 1536, class_token=False),
    # MobileCLIP's larger models (Vasu et al. 2023, Faghri et al. 2025)
    "vit_base_mci_224": ViTConfig(
        patch_size=16,
        stem="mobile",
        class_position=False,
        ln_pre=False,
        norm_eps=1e-6,
        activation="gelu",
        projection="linear",
    ),
    "vit_large_patch14_clip_224": ViTConfig(
        patch_size=14, width=1024, layers=24, heads=16, activation="gelu", projection="linear"
    ),
}


def find_name(config: ViTConfig) -> str | None:
    """timm's name of an image tower of any depth, if it has one."""
    mlp_ratio = config.mlp_width / config.width
    for name, tower in VITS.items():
        same = replace(config, projection=tower.projection, layers=tower.layers, mlp_ratio=tower.mlp_ratio)
        if tower == same and tower.mlp_width / tower.width == mlp_ratio:
            return name
    return None


_BLOCK_PARTS = {
    "ln_1": "norm1",
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PARTS = {
    # layers, each with what a layer has (weight, bias, running statistics)
    "conv1": "patch_embed.proj",
    "conv1.conv1": "patch_embed.backbone.0.conv",
    "conv1.norm1": "patch_embed.backbone.0.bn",
    "conv1.conv2": "patch_embed.backbone.1.conv",
    "conv1.norm2": "patch_embed.backbone.1.bn",
    "conv1.project": "patch_embed.backbone.2.conv",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "attn_pool.out_proj": "attn_pool.proj",
    "attn_pool.ln": "attn_pool.norm",
    "attn_pool.mlp.c_fc": "attn_pool.mlp.fc1",
    "attn_pool.mlp.c_proj": "attn_pool.mlp.fc2",
}
_PLACES = {
    "class_embedding": Source(("cls_token",), axes=2),
    "positional_embedding": Source(("pos_embed",), axes=1),
    "attn_pool.latent": Source(("attn_pool.latent",), axes=2),
    "attn_pool.in_proj.weight": Source(("attn_pool.q.weight", "attn_pool.kv.weight"), shares=(1, 2)),
    "attn_pool.in_proj.bias": Source(("attn_pool.q.bias", "attn_pool.kv.bias"), shares=(1, 2)),
    "proj": Source(("head.weight",), transpose=True),
    "proj_bias": Source(("head.bias",)),
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")


def find_place(name: str) -> Source:
    """Where timm keeps a tensor of our image tower, both without their prefix."""
    if name in _PLACES:
        return _PLACES[name]
    if match := _BLOCK.fullmatch(name):
        return Source((f"blocks.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}",))
    layer, end = name.rsplit(".", 1)
    return Source((f"{_PARTS[layer]}.{end}",))
