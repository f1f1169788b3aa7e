"""OpenCLIP's `model_cfg`, the architecture of a model, to our config and back.

It is read strictly: a key that changes what is computed and that we do not compute (layer scale, a modern text
tower, ...) is a reason to refuse, named with its value. A config without `quick_gelu` means GELU: that is OpenCLIP's
rule, and what it computes. Reference: open_clip 3.3.0, `CLIPVisionCfg` and `CLIPTextCfg`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.checkpoint.formats import timm
from diptych.checkpoint.formats.conventions import normal_form
from diptych.checkpoint.weights.tensors import is_count, read_json, short
from diptych.errors import UsageError
from diptych.model.architectures import PUBLISHED, get_width, read_architecture, write_architecture
from diptych.model.config import (
    Activation,
    CLIPConfig,
    Projection,
    ResNetConfig,
    TextConfig,
    TextPool,
    TimmConfig,
    TransformersTextConfig,
    ViTConfig,
)

# Keys that we understand or that change nothing in use; any other key may only be there with the value that means
# "as in CLIP".
_VISION_KEYS = frozenset(
    [
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "patch_dropout",
        "image_seq_len",
        "no_ln_pre",
        "pool_type",
        "final_ln_after_pool",
        "attentional_pool",
        "attn_pooler_heads",
        "norm_kwargs",
        "act_kwargs",
        "output_tokens",
        "timm_model_name",
        "timm_model_pretrained",
        "timm_model_kwargs",
        "timm_pool",
        "timm_proj",
        "timm_proj_bias",
        "timm_drop",
        "timm_drop_path",
    ]
)
_TEXT_KEYS = frozenset(
    [
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "pad_id",
        "eos_id",
        "no_causal_mask",
        "pool_type",
        "final_ln_after_pool",
        "proj_bias",
        "proj_type",
        "embed_cls",
        "norm_kwargs",
        "act_kwargs",
        "output_tokens",
        "hf_model_name",
        "hf_model_pretrained",
        "hf_proj_type",
        "hf_pooler_type",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "tokenizer_mode",
    ]
)
_MODEL_KEYS = frozenset(
    [
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "multimodal_cfg",
        "quick_gelu",
        "custom_text",
        "init_logit_scale",
        "init_logit_bias",
        "cast_dtype",
    ]
)
_AS_IN_CLIP: Mapping[str, tuple[Any, ...]] = {
    "pos_embed_type": ("learnable",),
    "block_type": (None, "default"),
    "attn_pooler_queries": (256,),
    "text_arch": ("clip",),
    "nonscalar_logit_scale": (False, True),
    "output_dict": (False, True),
}
_NOTHING = (None, False, {}, [])


def read_config(model: Mapping[str, Any], activation: Activation) -> CLIPConfig:
    """`model_cfg` -> our config; `activation` is the model's, which the caller has decided on.

    Raises UsageError or ValueError for what is not of the family, or makes no sense.
    """
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    _refuse_unknown("model_cfg", model, _MODEL_KEYS)
    _refuse_unknown("vision_cfg", vision, _VISION_KEYS)
    _refuse_unknown("text_cfg", text, _TEXT_KEYS)
    embed_dim = _count(model, "embed_dim", 512)
    tower = _read_vision(vision)
    text_activation = _read_activation(text, activation)
    if isinstance(tower, ViTConfig) and tower.activation == text_activation:
        tower = replace(tower, activation=None)
    elif isinstance(tower, ViTConfig) and not vision.get("timm_model_name"):
        own = _read_activation(vision, activation)
        tower = replace(tower, activation=None if own == text_activation else own)
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=tower,
        text=_read_encoder(text, embed_dim) if text.get("hf_model_name") else _read_text(text),
        activation=text_activation,
        logit_bias=model.get("init_logit_bias") is not None,
    )


def _read_vision(vision: Mapping[str, Any]) -> ViTConfig | ResNetConfig | TimmConfig:
    if vision.get("timm_model_name"):
        return _read_own(vision) or _read_timm(vision)
    image_size = _count(vision, "image_size", 224)
    layers, head_width = vision.get("layers", 12), _count(vision, "head_width", 64)
    if isinstance(layers, list):
        if len(layers) != 4 or not all(is_count(n) and n for n in layers) or head_width != 64:
            raise ValueError("a ResNet has four numbers of layers, and 64 channels a head")
        one, two, three, four = layers
        return ResNetConfig(image_size=image_size, layers=(one, two, three, four), width=_count(vision, "width", 64))
    width = _count(vision, "width", 768)
    if width % head_width:
        raise ValueError(f"width {width} is no multiple of head_width {head_width}")
    pool, after = vision.get("pool_type", "tok"), vision.get("final_ln_after_pool", False)
    if pool not in ("tok", "avg") or type(after) is not bool or (pool == "avg" and not after):
        raise UsageError(f"vision_cfg has pool_type = {short(pool)}, final_ln_after_pool = {short(after)}")
    if (attentional := vision.get("attentional_pool", False)) not in (False, True):
        raise UsageError(f"vision_cfg has attentional_pool = {short(attentional)}")
    return ViTConfig(
        image_size=image_size,
        patch_size=_count(vision, "patch_size", 16),
        width=width,
        layers=_count(vision, "layers", 12),
        heads=width // head_width,
        mlp_ratio=_mlp_ratio(vision, width),
        ln_pre=not vision.get("no_ln_pre", False),
        norm_eps=_norm_eps(vision),
        pool="queries" if attentional else "mean" if pool == "avg" else "class",
        pool_heads=_count(vision, "attn_pooler_heads", 8) if attentional else None,
    )


def _read_own(vision: Mapping[str, Any]) -> ViTConfig | None:
    """Our own tower where timm's of that name computes the same."""
    tower = timm.VITS.get(str(vision["timm_model_name"]))
    if tower is None or _count(vision, "image_size", 224) != tower.image_size:
        return None
    projection = vision.get("timm_proj", "linear")
    if vision.get("timm_pool", "avg") != ("map" if tower.pool == "latent" else "token"):
        return None
    if projection not in (None, "", "none"):
        return None
    match vision.get("timm_model_kwargs") or None:
        case None:
            layers = tower.layers
        case {"depth": layers, **rest} if not rest and is_count(layers) and 0 < layers < 1000:
            pass
        case _:
            return None
    return replace(tower, projection="none" if projection == "none" else "linear", layers=layers)


def _read_timm(vision: Mapping[str, Any]) -> TimmConfig:
    name, pool, bias = vision["timm_model_name"], vision.get("timm_pool", "avg"), vision.get("timm_proj_bias", False)
    sizes = vision.get("timm_model_kwargs") or {}
    if not isinstance(name, str) or not isinstance(pool, str) or type(bias) is not bool or not isinstance(sizes, dict):
        raise ValueError(f"timm_model_name is {short(name)}, timm_pool {short(pool)}, timm_proj_bias {short(bias)}")
    projection = vision.get("timm_proj", "linear") or "head"
    if projection not in ("head", "none", "linear", "mlp"):
        raise UsageError(f"vision_cfg has timm_proj = {short(projection)}")
    return TimmConfig(
        name=name,
        image_size=_count(vision, "image_size", 224),
        pool=pool,
        projection=projection,  # pyright: ignore[reportArgumentType]
        bias=bias,
        sizes=json.dumps(sizes, sort_keys=True),
    )


def _read_encoder(text: Mapping[str, Any], embed_dim: int) -> TransformersTextConfig:
    name = text["hf_model_name"]
    if not isinstance(name, str):
        raise ValueError(f"hf_model_name is {short(name)}")
    if name in PUBLISHED:
        architecture = write_architecture(PUBLISHED[name])
    elif (Path(name) / "config.json").is_file():
        architecture = write_architecture(read_json(Path(name) / "config.json"))
    else:
        raise UsageError(
            f"text_cfg has hf_model_name = {short(name)}, whose architecture is not known here; known are "
            f"{', '.join(PUBLISHED)}, and a folder that holds its config.json"
        )
    pooler, projection = text.get("hf_pooler_type", "mean_pooler"), text.get("hf_proj_type", "mlp")
    is_bert = "d_model" not in read_architecture(architecture)
    pools = {
        "mean_pooler": "mean",
        "cls_pooler": "pooler" if is_bert else "class",
        "cls_last_hidden_state_pooler": "class",
    }
    if pooler not in pools:
        raise UsageError(f"text_cfg has hf_pooler_type = {short(pooler)}")
    if projection is None and get_width(architecture) != embed_dim:
        raise UsageError("text_cfg has no hf_proj_type, though its widths differ")
    if projection not in (None, "linear", "mlp"):
        raise UsageError(f"text_cfg has hf_proj_type = {short(projection)}")
    return TransformersTextConfig(
        architecture=architecture,
        context_length=_count(text, "context_length", 77),
        pool=pools[pooler],  # pyright: ignore[reportArgumentType]
        projection=projection or "none",  # pyright: ignore[reportArgumentType]
    )


def _read_text(text: Mapping[str, Any]) -> TextConfig:
    width = _count(text, "width", 512)
    pool: TextPool
    match text.get("pool_type", "argmax"):
        case _ if text.get("embed_cls", False):
            pool = "class"
        case "argmax" | "eos":
            pool = "end"
        case "last":
            pool = "last"
        case other:
            raise UsageError(f"text_cfg has pool_type = {short(other)}")
    projection: Projection = "linear" if text.get("proj_bias", False) else "matrix"
    if (kind := text.get("proj_type", "linear")) not in ("linear", "none"):
        raise UsageError(f"text_cfg has proj_type = {short(kind)}")
    end = text.get("eos_id") if text.get("pool_type") == "eos" else None
    pad = text.get("pad_id", 0)
    if not is_count(pad) or not (end is None or is_count(end)):
        raise ValueError(f"pad_id is {short(pad)}, eos_id {short(end)}")
    return TextConfig(
        context_length=_count(text, "context_length", 77),
        vocab_size=_count(text, "vocab_size", 49408),
        width=width,
        layers=_count(text, "layers", 12),
        heads=_count(text, "heads", 8),
        mlp_ratio=_mlp_ratio(text, width),
        is_causal=not text.get("no_causal_mask", False),
        pool=pool,
        end_id=end,
        pad_id=pad,
        norm_eps=_norm_eps(text),
        projection="none" if kind == "none" else projection,
    )


def _read_activation(tower: Mapping[str, Any], activation: Activation) -> Activation:
    match tower.get("act_kwargs") or None:
        case None:
            return activation
        case {"approximate": "tanh", **rest} if not rest and activation != "quick_gelu":
            return "gelu_tanh"
        case other:
            raise UsageError(f"act_kwargs are {short(other)}")


def _norm_eps(tower: Mapping[str, Any]) -> float:
    match tower.get("norm_kwargs") or None:
        case None:
            return 1e-5
        case {"eps": float(eps), **rest} if not rest:
            return eps
        case other:
            raise UsageError(f"norm_kwargs are {short(other)}")


def _mlp_ratio(tower: Mapping[str, Any], width: int) -> float:
    """OpenCLIP cuts width * ratio to an integer."""
    ratio = tower.get("mlp_ratio", 4.0)
    if type(ratio) not in (int, float) or not 0 < ratio < 1000:
        raise ValueError(f"mlp_ratio is {short(ratio)}")
    return int(width * ratio) / width


def _count(section: Mapping[str, Any], key: str, default: int) -> int:
    match section.get(key, default):
        case int(value) | [int(value), int()] if is_count(value) and 0 < value < 1 << 24:
            pass
        case other:
            raise ValueError(f"{key} is {short(other)}")
    if section.get(key, value) not in (value, [value, value]):
        raise ValueError(f"{key} is {short(section[key])}, not square")
    return value


def _section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = record.get(key)
    if not isinstance(section, dict):
        raise ValueError(f"it has no {key}")
    return section


def _refuse_unknown(where: str, section: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in section.items():
        if key not in known and value not in _NOTHING and value not in _AS_IN_CLIP.get(key, ()):
            raise UsageError(f"{where} has {short(key)} = {short(value)}")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Our config -> `model_cfg`; `why_not` says whether OpenCLIP has words for all of it."""
    vision, text = config.vision, config.text
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": _write_vision(vision, config.activation),
        "text_cfg": _write_text(text, config.activation),
    }
    if is_custom(config):
        model["custom_text"] = True
    if config.logit_bias:
        model["init_logit_bias"] = -10
    return model


def is_custom(config: CLIPConfig) -> bool:
    """Whether OpenCLIP builds a CustomTextCLIP, whose text tower is a module of its own."""
    text = config.text
    if isinstance(config.vision, TimmConfig) or isinstance(text, TransformersTextConfig):
        return True
    has_timm = isinstance(config.vision, ViTConfig) and timm_name(config.vision, config.activation) is not None
    return has_timm or text.projection == "linear" or text.pool == "class" or config.logit_bias


def timm_name(vision: ViTConfig, activation: Activation) -> str | None:
    """timm's name of a tower that OpenCLIP's own Vision Transformer is not; `activation` is the model's."""
    if vision.projection == "matrix":
        return None
    return timm.find_name(replace(vision, activation=vision.activation or activation))


def _write_vision(vision: ViTConfig | ResNetConfig | TimmConfig, activation: Activation) -> dict[str, Any]:
    if isinstance(vision, TimmConfig):
        return {
            "image_size": vision.image_size,
            "timm_model_name": vision.name,
            "timm_model_pretrained": False,
            "timm_pool": vision.pool,
            "timm_proj": None if vision.projection == "head" else vision.projection,
            **({"timm_proj_bias": True} if vision.bias else {}),
            **({"timm_model_kwargs": sizes} if (sizes := vision.read_sizes()) else {}),
        }
    tower: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetConfig):
        return tower | {"layers": list(vision.layers), "patch_size": None}
    if name := timm_name(vision, activation):
        return {
            "image_size": vision.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map" if vision.pool == "latent" else "token",
            "timm_proj": "none" if vision.projection == "none" else None,
            **({} if vision.layers == timm.VITS[name].layers else {"timm_model_kwargs": {"depth": vision.layers}}),
        }
    tower |= {
        "layers": vision.layers,
        "patch_size": vision.patch_size,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": _exact_ratio(vision),
    }
    if not vision.ln_pre:
        tower["no_ln_pre"] = True
    if vision.pool == "mean":
        tower |= {"pool_type": "avg", "final_ln_after_pool": True}
    if vision.pool == "queries":
        tower |= {"attentional_pool": True, "attn_pooler_heads": vision.pool_heads or vision.heads}
    return tower | _write_block(vision.norm_eps, vision.activation or activation)


def _write_text(text: TextConfig | TransformersTextConfig, activation: Activation) -> dict[str, Any]:
    if isinstance(text, TransformersTextConfig):
        named = (name for name in PUBLISHED if write_architecture(PUBLISHED[name]) == text.architecture)
        pools = {"mean": "mean_pooler", "class": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}
        return {
            "hf_model_name": next(named, None),
            "hf_model_pretrained": False,
            "hf_proj_type": None if text.projection == "none" else text.projection,
            "hf_pooler_type": pools[text.pool],
            "context_length": text.context_length,
        }
    tower: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": _exact_ratio(text),
    }
    if not text.is_causal:
        tower["no_causal_mask"] = True
    if text.pool == "class":
        tower["embed_cls"] = True
    elif text.pool == "last":
        tower["pool_type"] = "last"
    elif text.end_id is not None:
        tower |= {"pool_type": "eos", "eos_id": text.end_id}
    if text.pad_id:
        tower["pad_id"] = text.pad_id
    if text.projection != "matrix":
        tower |= {"proj_bias": True} if text.projection == "linear" else {"proj_type": "none"}
    return tower | _write_block(text.norm_eps, activation)


def _write_block(norm_eps: float, activation: Activation) -> dict[str, Any]:
    block: dict[str, Any] = {} if norm_eps == 1e-5 else {"norm_kwargs": {"eps": norm_eps}}
    return block | ({"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {})


def why_not(config: CLIPConfig) -> str | None:
    """Why OpenCLIP has no words for an architecture, if so."""
    if isinstance(config.vision, ViTConfig) and config.vision.stem == "conv":
        return "its image tower begins with a pyramid of convolutions, which only diptych has"
    quick, text = config.activation == "quick_gelu", config.text
    if isinstance(text, TransformersTextConfig) and _write_text(text, config.activation)["hf_model_name"] is None:
        return "open_clip fetches the architecture of such a text tower by name, and has no name for this one"
    try:
        said = read_config(write_config(config), "quick_gelu" if quick else "gelu")
    except (UsageError, ValueError):
        said = None
    if said is None or normal_form(said) != normal_form(config):
        return "OpenCLIP and timm have no name for its image tower, or no words for its text tower"
    return None


def _exact_ratio(tower: ViTConfig | TextConfig) -> float:
    """A ratio that is still the MLP's width when it is multiplied and cut."""
    ratio = tower.mlp_width / tower.width
    return ratio if int(tower.width * ratio) == tower.mlp_width else math.nextafter(ratio, math.inf)
