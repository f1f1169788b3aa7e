"""A model on disk: one self-describing folder.

    model.safetensors        weights
    tokenizer.json, ...      what the tokenizer saves of itself
    checkpoint.json          model config, preprocessing, and the size and XXH3 hash of every other file
    training.safetensors     optimizer and random state     (only in a checkpoint that training continues from)
    training.json            step, position in the data, config

The folder is written beside its place and renamed, so that a folder with its final name is whole. Every file is
hashed on load: a flipped bit is an error that names the file, not a slightly different model.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych import files
from diptych.config import from_dict, to_dict
from diptych.errors import CheckpointError, NotFoundError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig
from diptych.tokenizer import Tokenizer

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS = "checkpoint.json", "model.safetensors"
TRAINING, TRAINING_TENSORS = "training.json", "training.safetensors"
_STEP_PREFIX = "step_"


class Loaded(NamedTuple):
    """What is needed to use a model: the three agree with each other."""

    model: CLIP
    preprocess: Preprocess
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training needs beyond the model to go on exactly."""

    tensors: Mapping[str, Tensor]
    """Optimizer and random state, by name."""
    values: Mapping[str, Any]
    """Step, position, config: JSON."""


def save(folder: Path, loaded: Loaded, training: TrainingState | None = None) -> None:
    """Write a checkpoint folder, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_folder(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in loaded.model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        loaded.tokenizer.save(temporary)
        if training is not None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in training.tensors.items()}
            save_file(tensors, temporary / TRAINING_TENSORS)
            files.write_json(temporary / TRAINING, dict(training.values))
        description = {
            "format": "diptych checkpoint",
            "version": FORMAT_VERSION,
            "model": to_dict(loaded.model.config),
            "preprocess": to_dict(loaded.preprocess),
            "files": {
                file.name: {"bytes": file.stat().st_size, "xxh3": files.xxh3(file)}
                for file in sorted(temporary.iterdir())
            },
        }
        files.write_json(temporary / DESCRIPTION, {**description, "self": _fingerprint(description)})


def load(path: Path | str, device: torch.device | str = "cpu") -> Loaded:
    """Load a model in evaluation mode from a checkpoint folder, or the newest intact one in a run's folder."""
    folder = find(Path(path))
    description = read_description(folder)
    model = build_model(from_dict(CLIPConfig, description["model"]))
    load_weights(model, folder)
    preprocess = from_dict(Preprocess, description["preprocess"])
    return Loaded(model.to(device).eval(), preprocess, Tokenizer.load(folder))


def build_model(config: CLIPConfig) -> CLIP:
    """Build a model without spending time on an initialisation that is overwritten at once."""
    with torch.device("meta"):
        model = CLIP(config)
    return model.to_empty(device="cpu")


def load_weights(model: CLIP, folder: Path) -> None:
    """Fill a model; names and shapes must match to the last."""
    weights = _load_tensors(folder / WEIGHTS)
    expected = model.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS} belongs to another model: {len(missing)} tensors are missing "
            f"({_examples(missing)}), {len(unexpected)} unexpected ({_examples(unexpected)})"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS} belongs to another model: "
                f"{name} has shape {list(weights[name].shape)}, not {list(tensor.shape)}"
            )
    model.load_state_dict(weights)


def load_training(folder: Path) -> TrainingState:
    """Read what training continues from; the folder's hashes must have been checked by `read_description`."""
    if not (folder / TRAINING).exists():
        raise CheckpointError(f"{folder} is a finished model without training state; it cannot be continued")
    return TrainingState(
        tensors=_load_tensors(folder / TRAINING_TENSORS), values=json.loads((folder / TRAINING).read_text())
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Read checkpoint.json and hold every file of the folder to it."""
    if not (folder / DESCRIPTION).exists():
        raise NotFoundError(f"{folder} is no checkpoint: it has no {DESCRIPTION}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        claimed, listed, version = description.pop("self"), description["files"], description["version"]
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged") from None
    if claimed != _fingerprint(description):
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged: its own hash does not fit")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {version}; this diptych reads {FORMAT_VERSION}")
    for name, expected in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        if file.stat().st_size != expected["bytes"] or files.xxh3(file) != expected["xxh3"]:
            raise CheckpointError(f"{file} is damaged: its bytes are not those that were written")
    return description


def find(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest valid one of a run."""
    if not path.exists():
        raise NotFoundError(f"no such model: {path} (a checkpoint folder, or a run's folder)")
    if (path / DESCRIPTION).exists():
        return path
    newest, skipped = newest_valid(path)
    if newest is None:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in skipped)
        raise NotFoundError(f"no checkpoint in {path}" + (f"; unusable: {reasons}" if reasons else ""))
    return newest


def newest_valid(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a run whose files are all intact, and those passed over with the reason."""
    skipped = []
    for folder in sorted(run.glob(f"{_STEP_PREFIX}*"), reverse=True):
        try:
            read_description(folder)
        except (CheckpointError, NotFoundError) as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"{_STEP_PREFIX}{step:08d}"


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _fingerprint(description: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(description, sort_keys=True).encode())


def _examples(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "none"
