"""OpenCLIP's folders and hub repositories: `open_clip_config.json` beside the weights.

What `model_cfg` says is in open_clip_config.py, the names of timm's towers in timm.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych import files
from diptych.checkpoint.formats import open_clip_config, timm
from diptych.checkpoint.formats.conventions import (
    bare_tokenizer,
    foreign_tokenizer,
    from_openai,
    published_preprocess,
    to_openai,
    write_foreign_tokenizer,
)
from diptych.checkpoint.formats.open_clip_config import timm_name
from diptych.checkpoint.loaded import Loaded, Opened, build_meta, check_depth
from diptych.checkpoint.sources import Published
from diptych.checkpoint.weights.read import Source, Weights, clean_names, find_weights, read_tensor_file
from diptych.checkpoint.weights.tensors import read_json, short
from diptych.checkpoint.weights.write import save_tensors
from diptych.errors import CheckpointError, UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import (
    Activation,
    CLIPConfig,
    TextConfig,
    TimmConfig,
    TransformersTextConfig,
    ViTConfig,
    check_activation,
)
from diptych.tokenizer import Tokenizer
from diptych.tokenizer_json import JsonTokenizer
from diptych.tokens import CLEANERS, BaseTokenizer, Clean

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


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
    check_depth(config, file)
    names = clean_names(file, file.paths[0])
    config = replace(config, logit_bias="logit_bias" in names)  # open_clip_train writes it beside a config without
    section = {} if record.get("preprocess_cfg") is None else _section(path, record, "preprocess_cfg")
    preprocess = read_preprocess(path, section, config, published)
    text = _section(path, _section(path, record, "model_cfg"), "text_cfg")
    tokenizer = read_tokenizer(folder, text, config, file.paths[0])
    if tokenizer.pad_token_id and isinstance(config.text, TextConfig):
        config = replace(config, text=replace(config.text, pad_id=tokenizer.pad_token_id))
    return Opened(
        layout="open_clip",
        path=folder,
        config=config,
        preprocess=preprocess,
        tokenizer=tokenizer,
        weights=Weights(file=file, sources=find_sources(names, config)),
        evidence={"activation": reason},
        files=(path, *file.paths),
    )


def read_config(
    path: Path, record: Mapping[str, Any], activation: Activation | None, published: Published | None
) -> tuple[CLIPConfig, str]:
    """`model_cfg` -> our config, and what decided the activation."""
    model = _section(path, record, "model_cfg")
    decided, reason = _decide_activation(path, model, activation, published)
    try:
        config = open_clip_config.read_config(model, decided)
    except UsageError as error:
        raise CheckpointError(f"{path} is not of the CLIP family that diptych knows: {error}") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} makes no sense: {short(str(error))}") from None
    return config, reason


def read_tokenizer(folder: Path, text: Mapping[str, Any], config: CLIPConfig, weights: Path) -> BaseTokenizer:
    """CLIP's, or what `hf_tokenizer_name` stands for: its tokenizer.json lies in the folder."""
    if not text.get("hf_tokenizer_name"):
        return bare_tokenizer(weights, config)
    match text.get("tokenizer_kwargs") or {}:
        case {**rules} if rules.keys() <= {"clean", "strip_sep_token", "language"}:
            clean, strip = rules.get("clean", "whitespace"), rules.get("strip_sep_token", False)
            language = rules.get("language")
        case rules:
            clean, strip, language = None, None, None
    cleaner: Clean | None = next((name for name in CLEANERS if name == clean), None)
    if cleaner is None or type(strip) is not bool or not isinstance(language, str | None):
        raise CheckpointError(f"{folder / CONFIG}: tokenizer_kwargs {short(rules)} are not supported")
    return foreign_tokenizer(folder, config.text.context_length, cleaner, strip_sep_token=strip, language=language)


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


def _section(path: Path, record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = record.get(key)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} is no config of OpenCLIP's: it has no {key}")
    return section


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


# --- names -----------------------------------------------------------------------------------------------------------


def find_sources(names: Mapping[str, str], config: CLIPConfig) -> dict[str, Source]:
    """Our names -> tensors of a file under OpenCLIP's names. What is in it beside them comes under its own name."""
    prefix = "text." if "text.token_embedding.weight" in names else ""
    sources, used = {}, set()
    for ours in build_meta(config).state_dict():
        source = find_place(ours, config, prefix)
        if all(name in names for name in source.names):
            sources[ours] = source._replace(names=tuple(names[name] for name in source.names))
            used.update(source.names)
    others = (name for name in names if name not in used and not name.startswith(_NOT_READ))
    return sources | {from_openai(name): Source((names[name],)) for name in others}


_NOT_READ = ("text_decoder.",)
"""CoCa's caption decoder, which no feature needs."""


def find_place(name: str, config: CLIPConfig, prefix: str) -> Source:
    """Where OpenCLIP keeps one of our tensors; `prefix` stands before those of the text tower."""
    tower, _, rest = name.partition(".")
    if isinstance(config.vision if tower == "visual" else config.text, TimmConfig | TransformersTextConfig):
        return Source((name,))  # modules are as OpenCLIP has them
    if tower == "visual":
        if isinstance(config.vision, ViTConfig) and timm_name(config.vision, config.activation):
            place = timm.find_place(rest)
            return place._replace(names=tuple(f"visual.trunk.{part}" for part in place.names))
        if rest.startswith("attn_pool."):
            return Source((f"visual.{_QUERY_POOL.get(rest, rest)}",))
    if name == "text.class_embedding":
        return Source((f"{prefix}cls_emb",))
    if isinstance(config.text, TextConfig) and config.text.projection == "linear" and name in _LINEAR:
        return Source((f"{prefix}text_projection.{_LINEAR[name]}",), transpose=name == "text.text_projection")
    return Source((to_openai(name) if tower != "text" else prefix + to_openai(name),))


_LINEAR = {"text.text_projection": "weight", "text.projection_bias": "bias"}
_QUERY_POOL = {
    "attn_pool.q_weight": "attn_pool.attn.q_proj_weight",
    "attn_pool.k_weight": "attn_pool.attn.k_proj_weight",
    "attn_pool.v_weight": "attn_pool.attn.v_proj_weight",
    "attn_pool.in_bias": "attn_pool.attn.in_proj_bias",
    "attn_pool.out_proj.weight": "attn_pool.attn.out_proj.weight",
    "attn_pool.out_proj.bias": "attn_pool.attn.out_proj.bias",
}


def write_state(model: CLIP) -> dict[str, Tensor]:
    """A model's tensors under OpenCLIP's names, on the CPU."""
    prefix = "text." if open_clip_config.is_custom(model.config) else ""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state |= find_place(name, model.config, prefix).give(tensor.detach().cpu())
    return state


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(loaded: Loaded) -> str | None:
    """Why an OpenCLIP folder cannot hold this model."""
    if reason := open_clip_config.why_not(loaded.model.config):
        return reason
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, JsonTokenizer):
        return "open_clip has no words for its tokenizer's rules" if tokenizer.rules.template else None
    if tokenizer.fingerprint != Tokenizer.clip().fingerprint:
        return "its vocabulary is not OpenAI's, and open_clip would use that one all the same"
    return None


def write(folder: Path, loaded: Loaded) -> None:
    """Fill an empty folder with weights and config."""
    save_tensors(write_state(loaded.model), folder / WEIGHTS[0], {"format": "pt"})
    preprocess, tokenizer = loaded.preprocess, loaded.tokenizer
    model_cfg = open_clip_config.write_config(loaded.model.config)
    if isinstance(tokenizer, JsonTokenizer):
        write_foreign_tokenizer(folder, tokenizer)
        rules = {"clean": tokenizer.rules.clean} | ({"strip_sep_token": True} if tokenizer.rules.drop else {})
        model_cfg["text_cfg"] |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": rules}
    files.write_json(
        folder / CONFIG,
        {
            "model_cfg": model_cfg,
            "preprocess_cfg": {
                "mean": list(preprocess.mean),
                "std": list(preprocess.std),
                "interpolation": preprocess.interpolation,
                "resize_mode": {"shorter_side": "shortest", "squash": "squash"}[preprocess.resize],
            },
        },
    )
