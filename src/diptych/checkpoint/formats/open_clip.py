"""OpenCLIP's folders and hub repositories: `open_clip_config.json` beside the weights.

The config is read strictly: a key that changes what is computed and that is not CLIP's (other pooling, layer scale,
timm and Hugging Face towers, ...) is a reason to refuse, named with its value. A config without `quick_gelu` means
GELU: that is OpenCLIP's rule, and what it computes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych import files
from diptych.checkpoint.formats.conventions import (
    bare_tokenizer,
    openai_sources,
    openai_state,
    published_preprocess,
)
from diptych.checkpoint.loaded import Loaded, Opened, why_only_diptych
from diptych.checkpoint.sources import Published
from diptych.checkpoint.weights.read import Weights, clean_names, find_weights, read_tensor_file
from diptych.checkpoint.weights.tensors import is_count, read_json, short
from diptych.checkpoint.weights.write import save_tensors
from diptych.errors import CheckpointError, UsageError
from diptych.image import Preprocess
from diptych.model.config import Activation, CLIPConfig, ResNetConfig, TextConfig, ViTConfig, check_activation
from diptych.tokenizer import Tokenizer

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# Keys of open_clip 3.3.0's configs that we understand or that change nothing in use; any other key may only be there
# with the value that means "as in CLIP".
_VISION_KEYS = frozenset(["layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"])
_TEXT_KEYS = frozenset(["context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"])
_MODEL_KEYS = frozenset(
    ["embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "cast_dtype"]
)
_AS_IN_CLIP: Mapping[str, tuple[Any, ...]] = {
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
    "block_type": (None, "default"),
    "timm_pool": ("avg",),
    "timm_proj": ("linear",),
    "attn_pooler_queries": (256,),
    "attn_pooler_heads": (8,),
    "hf_model_pretrained": (True,),
    "hf_proj_type": ("mlp",),
    "hf_pooler_type": ("mean_pooler",),
    "timm_drop": (0.0,),
    "nonscalar_logit_scale": (False, True),
    "output_dict": (False, True),
    "output_tokens": (False, True),
}
_NOTHING = (None, False, {}, [])


def open_folder(
    folder: Path,
    weights: Path | None = None,
    activation: Activation | None = None,
    published: Published | None = None,
) -> Opened:
    """Look into an OpenCLIP folder; of several files of weights `weights` may name one."""
    path = folder / CONFIG
    record = read_json(path)
    config, reason = read_config(path, record, activation, published)
    file = read_tensor_file(weights or find_weights(folder, WEIGHTS, CONFIG))
    section = {} if record.get("preprocess_cfg") is None else _section(path, record, "preprocess_cfg")
    preprocess = read_preprocess(path, section, config, published)
    return Opened(
        layout="open_clip",
        path=folder,
        config=config,
        preprocess=preprocess,
        tokenizer=bare_tokenizer(file.paths[0], config),
        weights=Weights(file=file, sources=openai_sources(clean_names(file, file.paths[0]))),
        evidence={"activation": reason},
        files=(path, *file.paths),
    )


def read_config(
    path: Path, record: Mapping[str, Any], activation: Activation | None, published: Published | None
) -> tuple[CLIPConfig, str]:
    """`model_cfg` -> our config, and what decided the activation."""
    model = _section(path, record, "model_cfg")
    vision, text = _section(path, model, "vision_cfg"), _section(path, model, "text_cfg")
    _refuse_unknown(path, "model_cfg", model, _MODEL_KEYS)
    _refuse_unknown(path, "vision_cfg", vision, _VISION_KEYS)
    _refuse_unknown(path, "text_cfg", text, _TEXT_KEYS)
    quick, reason = _decide_activation(path, model, activation, published)
    try:
        config = CLIPConfig(
            embed_dim=_count(model, "embed_dim", 512),
            vision=_vision_config(vision),
            text=TextConfig(
                context_length=_count(text, "context_length", 77),
                vocab_size=_count(text, "vocab_size", 49408),
                width=(width := _count(text, "width", 512)),
                layers=_count(text, "layers", 12),
                heads=_count(text, "heads", 8),
                mlp_ratio=_mlp_ratio(text, width),
            ),
            activation=quick,
        )
    except (UsageError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} makes no sense: {short(str(error))}") from None
    return config, reason


def _decide_activation(
    path: Path, model: Mapping[str, Any], given: Activation | None, published: Published | None
) -> tuple[Activation, str]:
    if given is not None:
        return check_activation(given), "given by the caller"
    quick = model.get("quick_gelu")
    if quick not in (None, True, False):
        raise CheckpointError(f"{path}: quick_gelu is {short(quick)}, neither true nor false")
    named: Activation = "quick_gelu" if quick else "gelu"
    if published is not None and quick is None:
        return published.activation, f"published as {published.name}"
    if published is not None and published.activation != named:
        raise CheckpointError(
            f"{path} says {named}, but {published.name} was published with {published.activation}; "
            "say which it is: activation='quick_gelu' or activation='gelu'"
        )
    if quick is None:
        return "gelu", f"{CONFIG} has no quick_gelu, which means GELU in OpenCLIP"
    return named, f"{CONFIG} says quick_gelu {str(quick).lower()}"


def _vision_config(vision: Mapping[str, Any]) -> ViTConfig | ResNetConfig:
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
    return ViTConfig(
        image_size=image_size,
        patch_size=_count(vision, "patch_size", 16),
        width=width,
        layers=_count(vision, "layers", 12),
        heads=width // head_width,
        mlp_ratio=_mlp_ratio(vision, width),
    )


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


def _section(path: Path, record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = record.get(key)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} is no config of OpenCLIP's: it has no {key}")
    return section


def _refuse_unknown(path: Path, where: str, section: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in section.items():
        if key not in known and value not in _NOTHING and value not in _AS_IN_CLIP.get(key, ()):
            raise CheckpointError(
                f"{path} is not of the CLIP family that diptych knows: {where} has {short(key)} = {short(value)}"
            )


def read_preprocess(
    path: Path, record: Mapping[str, Any], config: CLIPConfig, published: Published | None
) -> Preprocess:
    """`preprocess_cfg` -> ours; what is not there is as published, or OpenAI's."""
    size = config.vision.image_size
    base = published_preprocess(published, size)
    resize = {"shortest": "shorter_side", "squash": "squash", None: base.resize}
    interpolation = {"bicubic": "bicubic", "bilinear": "bilinear", None: base.interpolation}
    modes = record.get("resize_mode"), record.get("interpolation")
    if (
        not all(isinstance(mode, str | None) for mode in modes)
        or modes[0] not in resize
        or modes[1] not in interpolation
    ):
        raise CheckpointError(f"{path}: pictures resized with {short(modes)} are not supported")
    if record.get("size") not in (None, size, [size, size], [3, size, size]):
        raise CheckpointError(f"{path}: pictures of {short(record.get('size'))} do not fit image_size {size}")
    mean, std = _triple(path, record, "mean", base.mean), _triple(path, record, "std", base.std)
    try:
        return Preprocess(
            image_size=size,
            mean=mean,
            std=std,
            resize=resize[modes[0]],  # pyright: ignore[reportArgumentType]
            interpolation=interpolation[modes[1]],  # pyright: ignore[reportArgumentType]
        )
    except UsageError as error:
        raise CheckpointError(f"{path} makes no sense: {error}") from None


def _triple(
    path: Path, record: Mapping[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise CheckpointError(f"{path}: {key} is {short(value)}, not three numbers")
    return float(value[0]), float(value[1]), float(value[2])


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(loaded: Loaded) -> str | None:
    """Why an OpenCLIP folder cannot hold this model."""
    if reason := why_only_diptych(loaded.model.config):
        return reason
    if loaded.tokenizer.fingerprint != Tokenizer.clip().fingerprint:
        return "its vocabulary is not OpenAI's, and open_clip would use that one all the same"
    return None


def write(folder: Path, loaded: Loaded) -> None:
    """Fill an empty folder with weights and config."""
    save_tensors(openai_state(loaded.model.state_dict().items()), folder / WEIGHTS[0], {"format": "pt"})
    preprocess = loaded.preprocess
    files.write_json(
        folder / CONFIG,
        {
            "model_cfg": write_config(loaded.model.config),
            "preprocess_cfg": {
                "mean": list(preprocess.mean),
                "std": list(preprocess.std),
                "interpolation": preprocess.interpolation,
                "resize_mode": {"shorter_side": "shortest", "squash": "squash"}[preprocess.resize],
            },
        },
    )


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Our config -> `model_cfg`."""
    vision, text = config.vision, config.text
    tower: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetConfig):
        tower |= {"layers": list(vision.layers), "patch_size": None}
    else:
        tower |= {
            "layers": vision.layers,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": _exact_ratio(vision),
        }
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": tower,
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": _exact_ratio(text),
        },
    }


def _exact_ratio(tower: ViTConfig | TextConfig) -> float:
    """A ratio that is still the MLP's width when it is multiplied and cut."""
    ratio = tower.mlp_width / tower.width
    return ratio if int(tower.width * ratio) == tower.mlp_width else math.nextafter(ratio, math.inf)
