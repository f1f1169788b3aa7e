"""From a name or a file to an architecture: our presets, those of OpenCLIP's published weights, one's own file."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diptych import files
from diptych.checkpoint.formats import open_clip_config
from diptych.checkpoint.weights.tensors import short
from diptych.config import from_dict
from diptych.errors import NotFoundError, UsageError, unknown_name
from diptych.model.config import PRESETS, CLIPConfig

_SUFFIXES = (".json", ".toml")


def find_architecture(name: str) -> CLIPConfig:
    """The architecture of this name, or that a file says: OpenCLIP's `model_cfg`, or a config of ours.

    Raises UsageError for what is none, or has parts that cannot be computed, NotFoundError for a file that is missing.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(_SUFFIXES):
        return read_architecture(Path(name))
    if (model := _published().get(name)) is not None:
        return _read(name, model)
    raise unknown_name("architecture", name, (*PRESETS, *_published()))


def read_architecture(path: Path) -> CLIPConfig:
    """A JSON or TOML file: `embed_dim`, `vision_cfg` and `text_cfg` as OpenCLIP's model configs have them (also as
    `model_cfg` of an open_clip_config.json), or `vision` and `text` with our names."""
    try:
        text = files.read_text(path)
        record = tomllib.loads(text) if path.suffix == ".toml" else files.parse_json(text)
    except FileNotFoundError:
        raise NotFoundError(f"no such architecture: {path} (a JSON or TOML file)") from None
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({short(str(error))})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path} holds no architecture: it is no object")
    if isinstance(model := record.get("model_cfg"), dict):
        record = model
    if "vision_cfg" in record:
        return _read(str(path), record)
    try:
        return from_dict(CLIPConfig, record)
    except (UsageError, TypeError) as error:
        raise UsageError(f"{path} holds no architecture: {error}") from None


def _read(name: str, model: Mapping[str, Any]) -> CLIPConfig:
    try:
        return open_clip_config.read_config(model, "quick_gelu" if model.get("quick_gelu") else "gelu")
    except (UsageError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{name} cannot be built: {error}") from None


@cache
def _published() -> Mapping[str, Mapping[str, Any]]:
    table = json.loads(resources.files("diptych.assets").joinpath("published.json").read_text("utf-8"))
    return {name: entry["model_cfg"] for name, entry in table["architectures"].items()}
