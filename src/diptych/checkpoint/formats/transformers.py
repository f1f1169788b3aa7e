"""transformers' `CLIPModel` folders and hub repositories: `config.json`, weights, tokenizer and preprocessor files.

Their tower splits what OpenAI joins (q, k, v), transposes both projections, and misspells `pre_layrnorm`; the
activation is `hidden_act`. The pooled text feature stands at the end token, whatever the old configs with
`eos_token_id` 2 say.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych import files
from diptych.bpe import SINGLE_TOKENS
from diptych.checkpoint.formats.conventions import TRANSPOSED, transformers_places, transformers_sources
from diptych.checkpoint.loaded import Loaded, Opened, why_only_diptych
from diptych.checkpoint.weights.read import Weights, clean_names, find_weights, read_tensor_file
from diptych.checkpoint.weights.tensors import MAX_JSON, is_count, open_file, read_json, short
from diptych.checkpoint.weights.write import save_tensors
from diptych.errors import CheckpointError, UsageError
from diptych.image import OPENAI_MEAN, OPENAI_STD, Preprocess
from diptych.model.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig, check_activation
from diptych.tokenizer import Tokenizer

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_START, _END = "<|startoftext|>", "<|endoftext|>"

# --- reading ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, weights: Path | None = None) -> Opened:
    """Look into a transformers folder; of several files of weights `weights` may name one."""
    path = folder / CONFIG
    config = read_config(path, read_json(path))
    file = read_tensor_file(weights or find_weights(folder, WEIGHTS, CONFIG))
    preprocess, preprocess_files = read_preprocess(folder, config.vision.image_size)
    tokenizer, tokenizer_files = read_tokenizer(folder, config.text)
    return Opened(
        layout="transformers",
        path=folder,
        config=config,
        preprocess=preprocess,
        tokenizer=tokenizer,
        weights=Weights(file=file, sources=transformers_sources(clean_names(file, file.paths[0]), file.paths[0])),
        evidence={"activation": f"{CONFIG} says hidden_act {config.activation}"},
        files=(path, *preprocess_files, *tokenizer_files, *file.paths),
    )


def read_config(path: Path, record: Mapping[str, Any]) -> CLIPConfig:
    """`config.json` -> our config. What is absent has the value of transformers' CLIPConfig."""
    if record.get("model_type") != "clip":
        raise CheckpointError(
            f"{path} describes a model of type {short(record.get('model_type'))}; of transformers' models only "
            "CLIPModel (type clip) is of the family that diptych knows"
        )
    text, vision = _section(path, record, "text_config"), _section(path, record, "vision_config")
    acts = {str(section.get("hidden_act", "quick_gelu")) for section in (text, vision)}
    if len(acts) != 1 or not acts <= {"quick_gelu", "gelu"}:
        raise CheckpointError(f"{path}: hidden_act is {short(sorted(acts))}; both towers need quick_gelu, or both gelu")
    for section in (text, vision):
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise CheckpointError(f"{path}: layer_norm_eps is {short(section['layer_norm_eps'])}; CLIP's is 1e-5")
    if vision.get("num_channels", 3) != 3:
        raise CheckpointError(f"{path}: pictures have {short(vision['num_channels'])} channels; CLIP's have 3")
    try:
        config = CLIPConfig(
            embed_dim=_count(record, "projection_dim", 512),
            vision=ViTConfig(
                image_size=_count(vision, "image_size", 224),
                patch_size=_count(vision, "patch_size", 32),
                width=(width := _count(vision, "hidden_size", 768)),
                layers=_count(vision, "num_hidden_layers", 12),
                heads=_count(vision, "num_attention_heads", 12),
                mlp_ratio=_count(vision, "intermediate_size", 3072) / width,
            ),
            text=TextConfig(
                context_length=_count(text, "max_position_embeddings", 77),
                vocab_size=_count(text, "vocab_size", 49408),
                width=(width := _count(text, "hidden_size", 512)),
                layers=_count(text, "num_hidden_layers", 12),
                heads=_count(text, "num_attention_heads", 8),
                mlp_ratio=_count(text, "intermediate_size", 2048) / width,
            ),
            activation=check_activation(acts.pop()),
        )
    except ValueError as error:
        raise CheckpointError(f"{path} makes no sense: {short(str(error))}") from None
    end = text.get("eos_token_id", 49407)
    if end not in (2, config.text.vocab_size - 1):  # 2: written by mistake for years, and read as "the largest id"
        raise CheckpointError(
            f"{path}: eos_token_id is {short(end)}; CLIP reads the feature at the largest id, "
            f"{config.text.vocab_size - 1}"
        )
    return config


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


def read_tokenizer(folder: Path, text: TextConfig) -> tuple[Tokenizer, tuple[Path, ...]]:
    """The vocabulary that lies there, checked id for id; without one, the released vocabulary."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        name = read_json(settings).get("tokenizer_class")
        if name not in (None, "CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"):
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
    if isinstance(loaded.model.config.vision, ResNetConfig):
        return "transformers' CLIPModel has no ResNet image tower"
    if not isinstance(loaded.tokenizer, Tokenizer):
        return "transformers' CLIPModel has byte-pair merges, its tokenizer is of another kind"
    return why_only_diptych(loaded.model.config)


def write(folder: Path, loaded: Loaded) -> None:
    """Fill an empty folder with weights, config, preprocessor and tokenizer."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in loaded.model.state_dict().items():
        match transformers_places(name):
            case (place,):
                tensors[place] = tensor.T if name in TRANSPOSED else tensor
            case several:
                parts = tensor.chunk(len(several))
                tensors |= {place: part.clone() for place, part in zip(several, parts, strict=True)}
    save_tensors(tensors, folder / WEIGHTS[0], {"format": "pt"})
    files.write_json(folder / CONFIG, write_config(loaded.model.config, str(loaded.model.dtype).split(".")[1]))
    files.write_json(folder / PREPROCESSOR, _write_preprocess(loaded.preprocess))
    if isinstance(loaded.tokenizer, Tokenizer):
        _write_tokenizer(folder, loaded.tokenizer)


def write_config(config: CLIPConfig, dtype: str) -> dict[str, Any]:
    """Our config -> `config.json`."""
    vision, text = config.vision, config.text
    if isinstance(vision, ResNetConfig):
        raise UsageError("transformers' CLIPModel has no ResNet image tower")
    shared = {"hidden_act": config.activation, "layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
    start, end = text.vocab_size - 2, text.vocab_size - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "dtype": dtype,
        "torch_dtype": dtype,  # before transformers 4.56
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
            **shared,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **shared,
        },
    }


def _write_preprocess(preprocess: Preprocess) -> dict[str, Any]:
    size = preprocess.image_size
    square = {"height": size, "width": size}
    crops = preprocess.resize == "shorter_side"
    return {
        "image_processor_type": "CLIPImageProcessor",
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


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokens = [*SINGLE_TOKENS, *(merge.replace(" ", "") for merge in tokenizer.merges), _START, _END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    files.write_bytes(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    files.write_bytes(folder / "merges.txt", ("\n".join(["#version: 0.2", *tokenizer.merges]) + "\n").encode())
    specials = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    files.write_json(folder / "special_tokens_map.json", specials)
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": tokenizer.context_length}
    files.write_json(folder / "tokenizer_config.json", {**settings, **specials})
