"""Small models of later families, as OpenCLIP's configs say them; timm's towers are named, and made small by `TIMM`."""

from typing import Any

import numpy as np

TIMM: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224": {"img_size": 40, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "vit_so400m_patch14_siglip_384": {
        "img_size": 40,
        "patch_size": 12,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 3.7362,
        "act_layer": "gelu_tanh",
    },
    "vit_pe_core_base_patch16_224": {
        "img_size": 40,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "ref_feat_shape": (3, 3),
        "attn_pool_num_heads": 4,
    },
    "vit_pe_core_gigantic_patch14_448": {
        "img_size": 40,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.5,
        "ref_feat_shape": (5, 5),
        "attn_pool_num_heads": 4,
    },
    "vit_base_mci_224": {"img_size": 48, "depth": 1},
    "vit_large_patch14_clip_224": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}

_TEXT = {"context_length": 12, "vocab_size": 300, "width": 64, "layers": 2, "heads": 2}
_OWN = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}


def _siglip(name: str, image_size: int, **text: Any) -> dict[str, Any]:
    tower = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none", "image_size": image_size}
    more = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    return {"embed_dim": 64, "vision_cfg": tower, "text_cfg": {**_TEXT, **more, **text}, "init_logit_bias": -10}


def _headed(name: str, pool: str, image_size: int, **text: Any) -> dict[str, Any]:
    tower = {"timm_model_name": name, "timm_pool": pool, "timm_proj": None, "image_size": image_size}
    return {"embed_dim": 48, "vision_cfg": tower, "text_cfg": {**_TEXT, **text}}


FAMILIES: dict[str, dict[str, Any]] = {
    "SigLIP": _siglip("vit_base_patch16_siglip_224", 40),
    "SigLIP 2, an edge is cut": _siglip(
        "vit_so400m_patch14_siglip_384", 40, act_kwargs={"approximate": "tanh"}, pad_id=1
    ),
    "PE-Core": _headed("vit_pe_core_base_patch16_224", "map", 40),
    "PE-Core, no class token": _headed("vit_pe_core_gigantic_patch14_448", "map", 40),
    "MobileCLIP-B": _headed("vit_base_mci_224", "token", 48),
    "MobileCLIP2-L": _headed("vit_large_patch14_clip_224", "token", 32, no_causal_mask=True),
    "CLIPA": {
        "embed_dim": 48,
        "vision_cfg": {**_OWN, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**_TEXT, "no_causal_mask": True, "pool_type": "last"},
    },
    "MetaCLIP 2": {"embed_dim": 48, "vision_cfg": _OWN, "text_cfg": {**_TEXT, "pool_type": "eos", "eos_id": 2}},
    "CoCa": {
        "embed_dim": 48,
        "vision_cfg": {**_OWN, "attentional_pool": True, "attn_pooler_heads": 4},
        "text_cfg": {**_TEXT, "embed_cls": True},
    },
}

_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 320,
}
ENCODERS: dict[str, dict[str, Any]] = {
    # transformers' configs under the names that OpenCLIP's configs have for larger ones
    "roberta-base": {"model_type": "roberta", **_BERT, "max_position_embeddings": 20},
    "facebook/nllb-200-distilled-600M": {
        "model_type": "m2m_100",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "vocab_size": 320,
    },
    "google/mt5-base": {
        "model_type": "mt5",
        "d_model": 32,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 64,
        "vocab_size": 320,
    },
}


def _encoder(name: str, projection: str | None, pooler: str) -> dict[str, Any]:
    text = {"hf_model_name": name, "hf_proj_type": projection, "hf_pooler_type": pooler, "context_length": 12}
    embed_dim = 24 if projection else 32
    return {"embed_dim": embed_dim, "vision_cfg": _OWN, "text_cfg": {**text, "hf_model_pretrained": False}}


def _trunk(name: str, pool: str, projection: str | None, size: int, **sizes: Any) -> dict[str, Any]:
    tower = {"timm_model_name": name, "timm_pool": pool, "timm_proj": projection, "image_size": size}
    return {"embed_dim": 24, "vision_cfg": {**tower, "timm_model_kwargs": sizes}, "text_cfg": _TEXT}


_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 64]}
FOREIGN: dict[str, dict[str, Any]] = {
    # towers that other libraries build
    "RoBERTa": _encoder("roberta-base", "mlp", "mean_pooler"),
    "RoBERTa, pooler": _encoder("roberta-base", "linear", "cls_pooler"),
    "RoBERTa, no projection": _encoder("roberta-base", None, "cls_last_hidden_state_pooler"),
    "NLLB": _encoder("facebook/nllb-200-distilled-600M", "linear", "cls_pooler"),
    "mT5": _encoder("google/mt5-base", "mlp", "mean_pooler"),
    "ConvNeXt": _trunk("convnext_base", "", "linear", 64, **_CONVNEXT),
    "ConvNeXt, MLP": _trunk("convnext_large", "", "mlp", 64, **_CONVNEXT),
    "ConvNeXt, attention": _trunk("convnext_base", "rot_attn", None, 64, **_CONVNEXT),
    "EVA02": _trunk("eva02_base_patch16_clip_224", "token", None, 64, img_size=64, depth=2, embed_dim=32, num_heads=2),
}


def end_texts(text: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The end token and padding of a family in place of CLIP's."""
    end = config["vocab_size"] - 1
    for row, place in zip(text, (text == end).argmax(axis=1), strict=True):
        row[place] = config.get("eos_id", end)
        row[place + 1 :] = config.get("pad_id", 0)
    return text
