"""Our own layout: one self-describing folder.

    model.safetensors        weights
    diptych_tokenizer.json   what the tokenizer saves of itself
    checkpoint.json          format version, model config, preprocessing, size and XXH3 hash of every other file
    training.safetensors     optimizer and random state     (only in a checkpoint that training continues from)
    training.json            step, position in the data, config

The folder is written beside its place and renamed, so that a folder with its final name is whole. Every file is
hashed on load, the weights in the pass that reads them: a flipped bit is an error that names the file, not a slightly
different model. An older format version is brought up to date in memory, step by step.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from diptych import files
from diptych.checkpoint.loaded import Loaded, Opened, check_shapes
from diptych.checkpoint.weights.read import Source, Weights, damaged
from diptych.checkpoint.weights.tensors import beside, read_json, read_safetensors, short
from diptych.checkpoint.weights.write import ALONE, make_file, on_every, on_first, write_parts
from diptych.config import from_dict, to_dict
from diptych.errors import CheckpointError, NotFoundError, UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig
from diptych.ranks import Ranks
from diptych.tokenizer import Tokenizer

FORMAT_VERSION = 3
DESCRIPTION, WEIGHTS = "checkpoint.json", "model.safetensors"
TRAINING, TRAINING_TENSORS = "training.json", "training.safetensors"
STEP_PREFIX = "step_"
_HASH = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that exact resume needs beyond the model."""

    tensors: Mapping[str, Tensor]
    """Optimizer and random state, by name."""
    values: Mapping[str, Any]
    """Step, position, config: JSON."""


def save(folder: Path, loaded: Loaded, training: TrainingState | None = None, ranks: Ranks = ALONE) -> None:
    """Write a checkpoint folder, all or nothing. Every rank of a job comes here, with its parts of the same tensors."""
    with ExitStack() as stack:
        temporary = on_first(ranks, lambda: stack.enter_context(files.atomic_folder(folder)))
        write(temporary, loaded, training, ranks)
        on_first(ranks, stack.close)


def write(folder: Path, loaded: Loaded, training: TrainingState | None = None, ranks: Ranks = ALONE) -> None:
    """Fill an empty folder: every rank writes its parts of the tensors, the first one the rest."""
    tensors = {WEIGHTS: loaded.model.state_dict()}
    if training is not None:
        tensors[TRAINING_TENSORS] = dict(training.tensors)

    def begin() -> None:
        for name, some in tensors.items():
            make_file(folder / name, some)
        loaded.tokenizer.save(folder)
        if training is not None:
            files.write_json(folder / TRAINING, dict(training.values))

    def write_tensors() -> None:
        for name, some in tensors.items():
            write_parts(folder / name, some, ranks)

    on_first(ranks, begin)
    on_every(ranks, write_tensors)
    on_first(ranks, lambda: _describe(folder, loaded))


def _describe(folder: Path, loaded: Loaded) -> None:
    description = {
        "format": "diptych checkpoint",
        "version": FORMAT_VERSION,
        "model": to_dict(loaded.model.config),
        "preprocess": to_dict(loaded.preprocess),
        "files": {
            file.name: {"bytes": file.stat().st_size, "xxh3": files.xxh3(file)} for file in sorted(folder.iterdir())
        },
    }
    files.write_json(folder / DESCRIPTION, {**description, "self": _fingerprint(description)})


def open_folder(folder: Path) -> Opened:
    """Look into a checkpoint folder; every file but the weights is hashed now, the weights when they are read."""
    description = read_description(folder, later={WEIGHTS})
    for name in (WEIGHTS, "diptych_tokenizer.json"):
        if name not in description["files"]:
            raise CheckpointError(f"{folder} is incomplete: {DESCRIPTION} does not list {name}")
    try:
        config = from_dict(CLIPConfig, description["model"])
        preprocess = from_dict(Preprocess, description["preprocess"])
        tokenizer = Tokenizer.load(folder)
    except UsageError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None
    weights = open_weights(folder, description)
    return Opened(
        layout="diptych",
        path=folder,
        config=config,
        preprocess=preprocess,
        tokenizer=tokenizer,
        weights=weights,
        evidence={"activation": f"{DESCRIPTION} says so"},
        files=(folder / DESCRIPTION, *(folder / name for name in description["files"])),
    )


def open_weights(folder: Path, description: Mapping[str, Any]) -> Weights:
    """The weights of a checkpoint folder, to be read and hashed in one pass."""
    xxh3 = description["files"][WEIGHTS]["xxh3"]
    try:
        file = read_safetensors(folder / WEIGHTS)
    except CheckpointError:
        if files.xxh3(folder / WEIGHTS) != xxh3:
            raise damaged(folder / WEIGHTS) from None
        raise
    return Weights(file=file, sources={name: Source((name,)) for name in file.entries}, xxh3=xxh3)


def map_weights(model: CLIP, folder: Path) -> dict[str, Tensor]:
    """The weights for a model that is there, not yet read (`TensorFile.map`); names and shapes must match to the last.

    The folder's hashes must have been checked, as `newest_valid` does.
    """
    weights = read_safetensors(folder / WEIGHTS)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(folder / WEIGHTS, expected, {name: entry.shape for name, entry in weights.entries.items()})
    return weights.map()


def load_training(folder: Path) -> TrainingState:
    """Look into a checkpoint's training state, tensors not yet read; the folder's hashes must have been checked."""
    if not (folder / TRAINING).exists():
        raise CheckpointError(f"{folder} is a finished model without training state; it cannot be continued")
    return TrainingState(tensors=read_safetensors(folder / TRAINING_TENSORS).map(), values=read_json(folder / TRAINING))


def read_description(folder: Path, later: Collection[str] = ()) -> dict[str, Any]:
    """Read checkpoint.json, in today's version, and hold every file of the folder to it, except those of `later`."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise NotFoundError(f"{folder} is no checkpoint: it has no {DESCRIPTION}")
    description = read_json(path)
    claimed = description.pop("self", None)
    listed, version = description.get("files"), description.get("version")
    parts = listed, description.get("model"), description.get("preprocess")
    if not all(isinstance(part, dict) for part in parts) or type(version) is not int or not claimed:
        raise CheckpointError(f"{path} is damaged: model, preprocess, files, version or its own hash is missing")
    if claimed != _fingerprint(description):
        raise CheckpointError(f"{path} is damaged: its own hash does not fit")
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}; this diptych reads 1 to {FORMAT_VERSION}: use a newer one"
        )
    for name, expected in description["files"].items():
        file = beside(path, name)
        hashed = isinstance(expected, dict) and expected.keys() == {"bytes", "xxh3"}
        if not hashed or not _HASH.fullmatch(str(expected["xxh3"])):
            raise CheckpointError(f"{path} is damaged: it does not give size and hash of {short(name)}")
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        if file.stat().st_size != expected["bytes"] or (name not in later and files.xxh3(file) != expected["xxh3"]):
            raise damaged(file)
    for old in range(version, FORMAT_VERSION):
        description = MIGRATIONS[old](description)
    return description


def _to_version_2(description: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knows MLPs of other widths, and other ways to resize."""
    model = dict(description["model"])
    for tower in ("vision", "text"):
        if isinstance(sizes := model.get(tower), dict) and sizes.get("type") != "ResNetConfig":
            model[tower] = sizes | {"mlp_ratio": 4.0}
    preprocess = description["preprocess"] | {"resize": "shorter_side", "interpolation": "bicubic"}
    return description | {"version": 2, "model": model, "preprocess": preprocess}


def _to_version_3(description: dict[str, Any]) -> dict[str, Any]:
    """Version 3 knows models whose logits have a bias."""
    return description | {"version": 3, "model": {"logit_bias": False} | description["model"]}


MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _to_version_2,
    2: _to_version_3,
}
"""From this version to the next. A published version is never forgotten."""


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
    for folder in step_folders(run):
        try:
            read_description(folder)
        except (CheckpointError, NotFoundError) as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def step_folders(run: Path) -> list[Path]:
    """Folders of a run that are checkpoints by their names, the newest first; `step_best` is somebody's own."""
    named = [(step, folder) for folder in run.glob(f"{STEP_PREFIX}*") if (step := step_of(folder)) is not None]
    return [folder for _, folder in sorted(named, reverse=True) if folder.is_dir() and not folder.is_symlink()]


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"{STEP_PREFIX}{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step whose checkpoint lies there, if one does by its name: `step_00001000` and nothing else, since old ones
    are deleted."""
    digits = folder.name.removeprefix(STEP_PREFIX)
    exact = folder.name.startswith(STEP_PREFIX) and digits.isascii() and digits.isdigit() and len(digits) >= 8
    return int(digits) if exact else None


def _fingerprint(description: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(description, sort_keys=True).encode())
