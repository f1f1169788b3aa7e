"""Content and soundness of a checkpoint: the answers of `diptych inspect` and `diptych verify`."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych import files
from diptych.checkpoint.layouts import open_checkpoint
from diptych.checkpoint.loaded import Loaded, Opened, build, build_meta, check_depth
from diptych.checkpoint.sources import expected_sha256
from diptych.checkpoint.weights import archive
from diptych.checkpoint.weights.tensors import short
from diptych.config import to_dict
from diptych.errors import ActivationUnknownError, CheckpointError
from diptych.model.config import PRESETS, Activation, CLIPConfig
from diptych.tokenizer import Tokenizer
from diptych.tokenizer_json import JsonTokenizer
from diptych.tokens import BaseTokenizer


def inspect(source: str | Path, *, activation: Activation | None = None, preset: str | None = None) -> dict[str, Any]:
    """Everything that is known of a checkpoint without reading its weights into a model, as JSON values."""
    known = True
    try:
        opened = open_checkpoint(source, activation=activation, preset=preset)
    except ActivationUnknownError:  # everything else is there to be told
        opened, known = open_checkpoint(source, activation="gelu", preset=preset), False
    check_depth(opened.config, opened.weights.file)
    model = build_meta(opened.config)
    unknown = {} if known else {"activation": "nothing shows it: --activation quick_gelu or --activation gelu"}
    numbers = opened.weights.dtypes
    return {
        "path": str(opened.path),
        "layout": opened.layout,
        "architecture": name_of(opened.config) or "its own",
        "parameters": {
            "image": _count(model.visual),
            "text": _count(model.text),
            "total": _count(model),
        },
        "activation": opened.config.activation if known else None,
        "evidence": dict(opened.evidence) | unknown,
        "model": to_dict(opened.config) | ({} if known else {"activation": None}),
        "preprocess": to_dict(opened.preprocess),
        "tokenizer": describe_tokenizer(opened.tokenizer),
        "dtype": {str(dtype).removeprefix("torch."): count for dtype, count in sorted(numbers.items(), key=str)},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)} for file in _weights_last(opened)
        },
    }


def name_of(config: CLIPConfig) -> str | None:
    """The preset that this is, but for the activation."""
    return next((n for n, preset in PRESETS.items() if replace(preset, activation=config.activation) == config), None)


def describe_tokenizer(tokenizer: BaseTokenizer) -> dict[str, Any]:
    """A tokenizer in a few values."""
    stock = tokenizer.fingerprint == Tokenizer.clip().fingerprint
    rules = to_dict(tokenizer.rules) if isinstance(tokenizer, JsonTokenizer) else None
    return {
        "vocabulary": "OpenAI's" if stock else "its own" if rules is None else "a tokenizer.json's",
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "special_tokens": tokenizer.special_tokens,
        "fingerprint": tokenizer.fingerprint,
        **({} if rules is None else {"rules": rules}),
    }


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The parts that were found sound."""

    sha256: Mapping[str, str]
    """SHA-256 of every file."""
    checked_against: Mapping[str, str]
    """File -> what its content was held against."""
    tensors: int
    """Read, all numbers finite."""
    temperature: float
    """1 / exp(logit_scale)."""
    features: str
    """Result of the forward pass."""


def verify(source: str | Path, *, activation: Activation | None = None, preset: str | None = None) -> Verification:
    """Read a checkpoint to its last byte and compute with it; CheckpointError names the first thing that is wrong."""
    opened = open_checkpoint(source, activation=activation, preset=preset)
    hashes, checked = {}, {}
    for file in _weights_last(opened):
        hashes[file.name] = files.sha256(file)
        if (expected := expected_sha256(file)) is not None:
            if hashes[file.name] != expected:
                raise CheckpointError(f"{file} is damaged: its sha256 is {hashes[file.name]}, not {expected}")
            checked[file.name] = "sha256 of the hub"
    if opened.layout == "diptych":
        opened.weights.check_hash()
        checked |= dict.fromkeys((f.name for f in opened.files), "XXH3 in checkpoint.json")
        checked["checkpoint.json"] = "its own XXH3"
    for file in opened.weights.file.paths:
        if zip_archive(file):
            archive.check_crc(file)
            checked[file.name] = "CRC-32 of its members"
    loaded = build(opened)
    state = loaded.model.state_dict()
    for name, tensor in state.items():
        check_values(opened.path, name, tensor)
    return Verification(
        sha256=hashes,
        checked_against=checked,
        tensors=len(state),
        temperature=math.exp(-loaded.model.logit_scale.item()),
        features=check_forward(opened.path, loaded),
    )


def check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for numbers no trained model has."""
    if not tensor.isfinite().all():
        counts = Counter({"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())})
        what = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise CheckpointError(f"{path}: {short(name)} holds values that are no numbers ({what})")
    if name.endswith("running_var") and (tensor < 0).any():
        raise CheckpointError(f"{path}: {short(name)} holds negative variances")


def check_forward(path: Path, loaded: Loaded) -> str:
    """One pass of both towers; CheckpointError unless the features can be used."""
    generator = torch.Generator().manual_seed(0)
    size = loaded.model.config.vision.image_size
    with torch.inference_mode():
        image = loaded.model.encode_image(torch.randn(2, 3, size, size, generator=generator))
        text = loaded.model.encode_text(loaded.tokenizer(["a photo of a cat", "two dogs in the rain"]))
    for tower, features in (("image", image), ("text", text)):
        if not features.isfinite().all() or not features.norm(dim=-1).min() > 0:
            raise CheckpointError(f"{path}: the {tower} features of a forward pass are not finite, or zero")
    lengths = image.norm(dim=-1).mean(), text.norm(dim=-1).mean()
    return (
        f"{image.shape[1]} features, finite; mean length {lengths[0]:.3g} of a picture's, {lengths[1]:.3g} of a text's"
    )


def zip_archive(file: Path) -> bool:
    """Whether a file begins as zip archives do."""
    with open(file, "rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _weights_last(opened: Opened) -> list[Path]:
    return sorted(opened.files, key=lambda file: file in opened.weights.file.paths)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
