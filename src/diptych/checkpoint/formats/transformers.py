"""transformers' `CLIPModel`, `MetaClip2Model`, `SiglipModel`, `ChineseCLIPModel` and `AltCLIPModel` folders and hub
repositories: `config.json`, weights, tokenizer and preprocessor files.

Their tower splits what OpenAI joins (q, k, v), transposes both projections, and misspells `pre_layrnorm`; the
activation is `hidden_act`. The pooled text feature stands at the end token, whatever the old configs with
`eos_token_id` 2 say.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diptych import files
from diptych.bpe import SINGLE_TOKENS
from diptych.checkpoint.formats.conventions import (
    foreign_tokenizer,
    normal_form,
    transformers_place,
    transformers_sources,
    write_foreign_tokenizer,
)
from diptych.checkpoint.loaded import Loaded, Opened, build_meta, check_depth, why_not_paper
from diptych.checkpoint.weights.read import Weights, clean_names, find_weights, read_tensor_file
from diptych.checkpoint.weights.tensors import MAX_JSON, is_count, open_file, read_json, short
from diptych.checkpoint.weights.write import save_tensors
from diptych.errors import CheckpointError, UsageError
from diptych.image import OPENAI_MEAN, OPENAI_STD, Preprocess
from diptych.model.architectures import read_architecture, write_architecture
from diptych.model.config import Activation, CLIPConfig, ResNetConfig, TextConfig, TransformersTextConfig, ViTConfig
from diptych.tokenizer import Tokenizer
from diptych.tokenizer_json import JsonTokenizer
from diptych.tokens import BaseTokenizer, Clean

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_LAYERS = "vision_model.encoder.layers."
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_START, _END = "<|startoftext|>", "<|endoftext|>"

# --- reading ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, weights: Path | None = None) -> Opened:
    """Look into a transformers folder; of several files of weights `weights` may name one."""
    path = folder / CONFIG
    record = read_json(path)
    config = read_config(path, record)
    kind = _KINDS[record["model_type"]].model
    file = read_tensor_file(weights or find_weights(folder, WEIGHTS, CONFIG))
    check_depth(config, file)
    names = clean_names(file, file.paths[0])
    if kind == "AltCLIPModel":  # transformers 5 saves it under names that its code does not have
        names = {name.replace("vision_model.encoder.layer.", _LAYERS): given for name, given in names.items()}
    preprocess, preprocess_files = read_preprocess(folder, config.vision.image_size)
    tokenizer, tokenizer_files = read_tokenizer(folder, config.text, record["model_type"])
    if isinstance(config.text, TransformersTextConfig):
        config = replace(config, text=replace(config.text, context_length=tokenizer.context_length))
    return Opened(
        layout="transformers",
        path=folder,
        config=config,
        preprocess=preprocess,
        tokenizer=tokenizer,
        weights=Weights(
            file=file,
            sources=transformers_sources(names, file.paths[0], build_meta(config).state_dict(), kind),
        ),
        evidence={"activation": f"{CONFIG} says hidden_act {config.activation}"},
        files=(path, *preprocess_files, *tokenizer_files, *file.paths),
    )


def read_config(path: Path, record: Mapping[str, Any]) -> CLIPConfig:
    """`config.json` -> our config. What is absent has the value of transformers' own config."""
    kind = str(record.get("model_type"))
    if kind not in _KINDS:
        raise CheckpointError(
            f"{path} describes a model of type {short(kind)}{_REASONS.get(kind, '')}; of transformers' models diptych "
            f"knows {', '.join(_KINDS)}"
        )
    text, vision = _section(path, record, "text_config"), _section(path, record, "vision_config")
    defaults = _KINDS[kind]
    ours = (vision,) if kind in _ENCODERS else (text, vision)
    acts = {str(section.get("hidden_act", defaults.hidden_act)) for section in ours}
    if len(acts) != 1 or not acts <= _ACTIVATIONS.keys():
        raise CheckpointError(
            f"{path}: hidden_act is {short(sorted(acts))}; both towers need the same, one of {', '.join(_ACTIVATIONS)}"
        )
    if vision.get("num_channels", 3) != 3:
        raise CheckpointError(f"{path}: pictures have {short(vision['num_channels'])} channels; CLIP's have 3")
    try:
        read = _read_siglip if kind == "siglip" else _read_encoder if kind in _ENCODERS else _read_clip
        config = read(record, text, vision, defaults, _ACTIVATIONS[acts.pop()])
    except ValueError as error:
        raise CheckpointError(f"{path} makes no sense: {short(str(error))}") from None
    largest, end = config.text.vocab_size - 1, text.get("eos_token_id", 49407)
    if kind == "clip" and end not in (2, largest):
        # 2: written by mistake for years, and read as "the largest id"
        raise CheckpointError(
            f"{path}: eos_token_id is {short(end)}; CLIP reads the feature at the largest id, {largest}"
        )
    return config


class _Defaults(NamedTuple):
    """What transformers' config classes say of what a file leaves out."""

    model: str
    """The class whose names the tensors have."""
    hidden_act: str
    norm_eps: float
    text: Mapping[str, int]
    vision: Mapping[str, int]


_OF_CLIP = {
    "text": {
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    },
    "vision": {
        "image_size": 224,
        "patch_size": 32,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
_OF_SIGLIP = {
    "text": {
        "max_position_embeddings": 64,
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "pad_token_id": 1,
    },
    "vision": {**_OF_CLIP["vision"], "patch_size": 16},
}
_KINDS: Mapping[str, _Defaults] = {
    "clip": _Defaults("CLIPModel", "quick_gelu", 1e-5, **_OF_CLIP),
    "metaclip_2": _Defaults("CLIPModel", "quick_gelu", 1e-5, **_OF_CLIP),  # the same names
    "siglip": _Defaults("SiglipModel", "gelu_pytorch_tanh", 1e-6, **_OF_SIGLIP),
    "chinese_clip": _Defaults("ChineseCLIPModel", "quick_gelu", 1e-5, text={}, vision=_OF_CLIP["vision"]),
    "altclip": _Defaults("AltCLIPModel", "quick_gelu", 1e-5, text={}, vision=_OF_CLIP["vision"]),
}
_ENCODERS: Mapping[str, Any] = {
    # the text tower's `model_type`, its projection, and the width of the joint space by default
    "chinese_clip": ("chinese_clip_text_model", "linear", 512),
    "altclip": ("altclip_text_model", "teacher", 768),
}
_REASONS = {"siglip2": ", whose pictures are of variable shape (NaFlex)"}
_ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_Section = Mapping[str, Any]


def _read_clip(
    record: _Section, text: _Section, vision: _Section, defaults: _Defaults, activation: Activation
) -> CLIPConfig:
    for section in (text, vision):
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"layer_norm_eps is {short(section['layer_norm_eps'])}; CLIP's is 1e-5")
    end = _token(text, "eos_token_id", defaults.text) if record["model_type"] == "metaclip_2" else None
    pad = 0 if end is None else _token(text, "pad_token_id", defaults.text)
    return CLIPConfig(
        embed_dim=_count(record, "projection_dim", 512),
        vision=ViTConfig(**_read_image_sizes(vision, defaults)),
        text=TextConfig(**_read_text_sizes(text, defaults), end_id=end, pad_id=pad),
        activation=activation,
    )


def _read_encoder(
    record: _Section, text: _Section, vision: _Section, defaults: _Defaults, activation: Activation
) -> CLIPConfig:
    """BERT's kin as the text tower, whose class token is read."""
    kind, projection, width = _ENCODERS[record["model_type"]]
    if vision.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"layer_norm_eps is {short(vision['layer_norm_eps'])}; CLIP's is 1e-5")
    return CLIPConfig(
        embed_dim=_count(record, "projection_dim", width),
        vision=ViTConfig(**_read_image_sizes(vision, defaults)),
        text=TransformersTextConfig(
            architecture=write_architecture({**text, "model_type": kind}), pool="class", projection=projection
        ),
        activation=activation,
    )


def _read_siglip(
    _: _Section, text: _Section, vision: _Section, defaults: _Defaults, activation: Activation
) -> CLIPConfig:
    if vision.get("vision_use_head", True) is not True:
        raise ValueError("vision_use_head is false: there is no pool that makes one feature of a picture")
    sizes, eps = _read_image_sizes(vision, defaults), _norm_eps(vision, defaults)
    tower = ViTConfig(
        **sizes,
        stem="patch_bias",
        cut_edge=sizes["image_size"] % sizes["patch_size"] > 0,
        class_token=False,
        ln_pre=False,
        norm_eps=eps,
        pool="latent",
        projection="none",
    )
    words = TextConfig(
        **_read_text_sizes(text, defaults),
        is_causal=False,
        pool="last",
        pad_id=_token(text, "pad_token_id", defaults.text),
        norm_eps=_norm_eps(text, defaults),
        projection="linear",
    )
    embed_dim = words.width if text.get("projection_size") is None else _count(text, "projection_size", words.width)
    return CLIPConfig(embed_dim=embed_dim, vision=tower, text=words, activation=activation, logit_bias=True)


def _read_image_sizes(vision: _Section, defaults: _Defaults) -> dict[str, Any]:
    known = defaults.vision
    return {
        "image_size": _count(vision, "image_size", known["image_size"]),
        "patch_size": _count(vision, "patch_size", known["patch_size"]),
        **_read_blocks(vision, known),
    }


def _read_text_sizes(text: _Section, defaults: _Defaults) -> dict[str, Any]:
    known = defaults.text
    return {
        "context_length": _count(text, "max_position_embeddings", known["max_position_embeddings"]),
        "vocab_size": _count(text, "vocab_size", known["vocab_size"]),
        **_read_blocks(text, known),
    }


def _read_blocks(tower: _Section, known: Mapping[str, int]) -> dict[str, Any]:
    width = _count(tower, "hidden_size", known["hidden_size"])
    return {
        "width": width,
        "layers": _count(tower, "num_hidden_layers", known["num_hidden_layers"]),
        "heads": _count(tower, "num_attention_heads", known["num_attention_heads"]),
        "mlp_ratio": _count(tower, "intermediate_size", known["intermediate_size"]) / width,
    }


def _token(text: _Section, key: str, known: Mapping[str, int]) -> int:
    value = text.get(key, known[key])
    if not is_count(value):
        raise ValueError(f"{key} is {short(value)}")
    return value


def _norm_eps(tower: _Section, defaults: _Defaults) -> float:
    value = tower.get("layer_norm_eps", defaults.norm_eps)
    if type(value) is not float:
        raise ValueError(f"layer_norm_eps is {short(value)}")
    return value


def _section(path: Path, record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A tower's settings; those of the old `..._dict` win, as in transformers."""
    section, old = record.get(key) or {}, record.get(f"{key}_dict")
    if not isinstance(section, dict) or not isinstance(old, dict | None):
        raise CheckpointError(f"{path} makes no sense: {key} is no object")
    return section if old is None else old  # what the old one does not name is a default, not the new one's value


def _count(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if not is_count(value) or not 0 < value < 1 << 24:
        raise ValueError(f"{key} is {short(value)}")
    return value


def read_preprocess(folder: Path, image_size: int) -> tuple[Preprocess, tuple[Path, ...]]:
    """`preprocessor_config.json`, or the one inside `processor_config.json`, or OpenAI's."""
    path = folder / PREPROCESSOR
    record: Mapping[str, Any] | None = read_json(path) if path.is_file() else None
    if record is None and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        record = read_json(path).get("image_processor")
    if record is None:
        return Preprocess(image_size=image_size), ()
    try:
        return _preprocess(record, image_size), (path,)
    except (UsageError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be followed: {short(str(error))}") from None


def _preprocess(record: Mapping[str, Any], image_size: int) -> Preprocess:
    for step in ("do_resize", "do_normalize", "do_rescale"):
        if record.get(step, True) is not True:
            raise ValueError(f"{step} is {short(record[step])}")
    if abs(record.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {short(record['rescale_factor'])}")
    size = record.get("size", {"shortest_edge": image_size})
    size = {"shortest_edge": size} if type(size) is int else size
    square = {"height": image_size, "width": image_size}
    crops = record.get("do_center_crop", True)
    crop = record.get("crop_size", square)
    crop = {"height": crop, "width": crop} if type(crop) is int else crop
    if size not in ({"shortest_edge": image_size}, square) or (crops and crop != square):
        raise ValueError(f"size {short(size)} and crop_size {short(crop)} do not make {image_size} px of the model")
    if not crops and size != square:
        raise ValueError("without a crop the pictures are not square")
    filters = {3: "bicubic", 2: "bilinear"}
    if (resample := record.get("resample", 3)) not in filters:
        raise ValueError(f"resample is {short(resample)}; known are 3 (bicubic) and 2 (bilinear)")
    mean, std = record.get("image_mean", OPENAI_MEAN), record.get("image_std", OPENAI_STD)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("image_mean and image_std need three numbers each")
    return Preprocess(
        image_size=image_size,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resize="squash" if size == square else "shorter_side",
        interpolation=filters[resample],  # pyright: ignore[reportArgumentType]
    )


_OF_CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")


def read_tokenizer(
    folder: Path, text: TextConfig | TransformersTextConfig, kind: str
) -> tuple[BaseTokenizer, tuple[Path, ...]]:
    """The vocabulary that lies there, checked id for id; of a CLIPModel without one, the released vocabulary."""
    settings = folder / "tokenizer_config.json"
    name = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if kind != "clip" and name not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        clean: Clean = "canonicalize" if str(name).removesuffix("Fast") == "SiglipTokenizer" else "none"
        length = text.context_length
        if isinstance(text, TransformersTextConfig) and settings.is_file():
            longest: Any = read_json(settings).get("model_max_length")
            length = min(length, longest) if is_count(longest) and longest > 2 else length
        tokenizer = foreign_tokenizer(folder, length, clean)
        paths = (folder / name for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt"))
        return tokenizer, tuple(path for path in paths if path.is_file())
    if name not in _OF_CLIP_CLASSES:
        raise CheckpointError(f"{settings} names the tokenizer {short(name)}; CLIP's is CLIPTokenizer")
    found = _read_vocabulary(folder)
    if found is None:
        tokenizer = Tokenizer.clip(text.context_length)
        if tokenizer.vocab_size != text.vocab_size:
            raise CheckpointError(
                f"{folder} has no vocabulary (vocab.json and merges.txt), and its {text.vocab_size} ids are not the "
                f"released {tokenizer.vocab_size}"
            )
        return tokenizer, ()
    vocabulary, merges, paths = found
    stock = Tokenizer.clip(text.context_length)
    try:
        tokenizer = stock if merges == stock.merges else Tokenizer(merges, text.context_length)
    except UsageError as error:
        raise CheckpointError(f"{paths[0]} cannot be followed: {short(str(error))}") from None
    tokens = [*SINGLE_TOKENS, *(merge.replace(" ", "") for merge in merges), _START, _END]
    if vocabulary != {token: number for number, token in enumerate(tokens)}:
        raise CheckpointError(
            f"{paths[0]} numbers its tokens in another way than CLIP: single bytes, merges in order, start, end"
        )
    return tokenizer, paths


def _read_vocabulary(folder: Path) -> tuple[dict[str, Any], tuple[str, ...], tuple[Path, ...]] | None:
    """Token -> id, the merges, and the files they are from."""
    vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    if vocab.is_file() and merges.is_file():
        with open_file(merges) as file:
            data = file.read(MAX_JSON + 1)
        lines = data[:MAX_JSON].decode("utf-8", errors="replace").split("\n")
        lines = [line for line in lines if line and not line.startswith("#version")]
        return read_json(vocab), tuple(lines), (vocab, merges)
    if not whole.is_file():
        return None
    model = read_json(whole).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{whole} holds no byte-pair vocabulary")
    pairs = model.get("merges")
    if not isinstance(pairs, list) or not all(isinstance(p, str) or _is_pair(p) for p in pairs):
        raise CheckpointError(f"{whole} holds no merges")
    return model["vocab"], tuple(p if isinstance(p, str) else " ".join(p) for p in pairs), (whole,)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(loaded: Loaded) -> str | None:
    """Why a transformers folder cannot hold this model."""
    config = loaded.model.config
    if isinstance(config.vision, ResNetConfig):
        return "transformers' CLIPModel has no ResNet image tower"
    if find_kind(config) is None:
        return why_not_paper(config) or "transformers has no class for these towers"
    return None


def find_kind(config: CLIPConfig) -> str | None:
    """`model_type` of the class that computes what this config says, if transformers has one."""
    for kind in _KINDS:
        try:
            record = write_config(config, "float32", kind)
            said = read_config(Path(CONFIG), record)
        except (CheckpointError, UsageError, ValueError):
            continue
        if isinstance(config.text, TransformersTextConfig):  # the tokenizer's to say
            said = replace(said, text=replace(said.text, context_length=config.text.context_length))
        if normal_form(said) == normal_form(config):
            return kind
    return None


def write(folder: Path, loaded: Loaded) -> None:
    """Fill an empty folder with weights, config, preprocessor and tokenizer."""
    config = loaded.model.config
    kind = find_kind(config)
    if kind is None:
        raise UsageError("transformers has no class for these towers")
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.model.state_dict().items():
        tensors |= transformers_place(name, _KINDS[kind].model).give(tensor.detach().cpu())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / WEIGHTS[0], {"format": "pt"})
    files.write_json(folder / CONFIG, write_config(config, str(loaded.model.dtype).split(".")[1], kind))
    files.write_json(folder / PREPROCESSOR, _write_preprocess(loaded.preprocess, kind))
    _write_tokenizer(folder, loaded.tokenizer)


def write_config(config: CLIPConfig, dtype: str, kind: str = "clip") -> dict[str, Any]:
    """Our config -> `config.json` of a kind; `find_kind` says which one means the same."""
    vision, text = config.vision, config.text
    is_encoder = kind in _ENCODERS
    if not isinstance(vision, ViTConfig) or is_encoder != isinstance(text, TransformersTextConfig):
        raise UsageError(f"transformers' {_KINDS[kind].model} has other towers")
    act = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    record: dict[str, Any] = {
        "architectures": [_KINDS[kind].model if kind != "metaclip_2" else "MetaClip2Model"],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,  # before transformers 4.56
        "text_config": _write_text(text, act, kind),
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **_write_blocks(vision, act),
        },
    }
    if kind == "siglip":
        record["text_config"]["projection_size"] = config.embed_dim
        return record
    record["projection_dim"] = config.embed_dim
    for section in ("text_config", "vision_config"):
        record[section]["projection_dim"] = config.embed_dim
    return record


def _write_text(text: TextConfig | TransformersTextConfig, act: str, kind: str) -> dict[str, Any]:
    if isinstance(text, TransformersTextConfig):
        return dict(read_architecture(text.architecture))
    end = text.vocab_size - 1 if text.end_id is None else text.end_id
    return {
        "model_type": f"{kind}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        **_write_blocks(text, act),
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": end,
        "pad_token_id": text.pad_id if kind != "clip" else end,
    }


def _write_blocks(tower: ViTConfig | TextConfig, act: str) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": act,
        "layer_norm_eps": tower.norm_eps,
    }


def _write_preprocess(preprocess: Preprocess, kind: str) -> dict[str, Any]:
    size = preprocess.image_size
    square = {"height": size, "width": size}
    crops = preprocess.resize == "shorter_side"
    return {
        "image_processor_type": "SiglipImageProcessor" if kind == "siglip" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crops else square,
        "resample": {"bicubic": 3, "bilinear": 2}[preprocess.interpolation],
        "do_center_crop": crops,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _write_tokenizer(folder: Path, tokenizer: BaseTokenizer) -> None:
    if isinstance(tokenizer, JsonTokenizer):
        write_foreign_tokenizer(folder, tokenizer)
        return
    assert isinstance(tokenizer, Tokenizer)
    tokens = [*SINGLE_TOKENS, *(merge.replace(" ", "") for merge in tokenizer.merges), _START, _END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    files.write_bytes(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    files.write_bytes(folder / "merges.txt", ("\n".join(["#version: 0.2", *tokenizer.merges]) + "\n").encode())
    specials = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    files.write_json(folder / "special_tokens_map.json", specials)
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": tokenizer.context_length}
    files.write_json(folder / "tokenizer_config.json", {**settings, **specials})
