"""diptych: build and use CLIP models from end to end.

Names are imported when they are first used, so that `import diptych` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.checkpoint.layouts import load, save
    from diptych.checkpoint.loaded import Loaded
    from diptych.embed.images import embed_images
    from diptych.embed.texts import embed_texts
    from diptych.errors import DiptychError
    from diptych.image import Preprocess
    from diptych.model.clip import CLIP
    from diptych.model.config import PRESETS, CLIPConfig
    from diptych.pair import Pair
    from diptych.shards.dataset import load_dataset
    from diptych.shards.write import write_shards
    from diptych.templates import load_templates
    from diptych.tokenizer import Tokenizer
    from diptych.train.loss import clip_loss
    from diptych.zeroshot import ZeroShotClassifier

__version__ = "0.1.0"

_HOME = {
    "CLIP": "diptych.model.clip",
    "CLIPConfig": "diptych.model.config",
    "DiptychError": "diptych.errors",
    "Loaded": "diptych.checkpoint.loaded",
    "PRESETS": "diptych.model.config",
    "Pair": "diptych.pair",
    "Preprocess": "diptych.image",
    "Tokenizer": "diptych.tokenizer",
    "ZeroShotClassifier": "diptych.zeroshot",
    "clip_loss": "diptych.train.loss",
    "embed_images": "diptych.embed.images",
    "embed_texts": "diptych.embed.texts",
    "load": "diptych.checkpoint.layouts",
    "load_dataset": "diptych.shards.dataset",
    "load_templates": "diptych.templates",
    "save": "diptych.checkpoint.layouts",
    "write_shards": "diptych.shards.write",
}

__all__ = [
    "CLIP",
    "CLIPConfig",
    "DiptychError",
    "Loaded",
    "PRESETS",
    "Pair",
    "Preprocess",
    "Tokenizer",
    "ZeroShotClassifier",
    "clip_loss",
    "embed_images",
    "embed_texts",
    "load",
    "load_dataset",
    "load_templates",
    "save",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
