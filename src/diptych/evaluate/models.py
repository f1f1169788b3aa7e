"""The models that are evaluated: their names, and what figures need to know of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diptych.checkpoint.layouts import load
from diptych.checkpoint.loaded import Loaded
from diptych.checkpoint.sources import HUB
from diptych.embed.cache import FeatureCache, content_key
from diptych.embed.images import image_space
from diptych.embed.texts import embed_texts, text_space
from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.prompts import EmbedTexts
from diptych.evaluate.results import ModelFacts
from diptych.model.cost import image_tower
from diptych.ranks import Ranks

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is ready."""

    name: str
    loaded: Loaded
    facts: ModelFacts
    text_space: str
    embed_texts: EmbedTexts
    """Through the cache."""


def model_names(models: Sequence[str]) -> dict[str, str]:
    """Name -> source; NAME=SOURCE gives the name, else it is made of the source."""
    found: dict[str, str] = {}
    for given in models:
        name, equals, source = given.partition("=")
        if not equals or not _NAME.fullmatch(name):
            name, source = _name_of(given), given
        if name in found or name.startswith("."):
            raise UsageError(f"two models are called {name}; give them names: --model a={source}")
        found[name] = source
    return found


def _name_of(source: str) -> str:
    """runs/demo -> demo, ViT-B-32/openai -> ViT-B-32-openai, hf-hub:owner/name -> owner-name."""
    path = Path(source)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", source.removeprefix(HUB)).strip("-.")


def open_model(name: str, source: str, config: EvaluateConfig, cache: FeatureCache, us: Ranks) -> OpenedModel:
    """Load a model to where it is to be computed."""
    device = config.device
    if device == "auto":
        device = f"cuda:{us.local_rank}" if torch.cuda.is_available() else "cpu"
    loaded = load(source, device=device, activation=config.activation, preset=config.preset)
    facts = ModelFacts(
        name=name,
        source=source,
        space=image_space(loaded, config.precision),
        embed_dim=loaded.model.config.embed_dim,
        image_size=loaded.preprocess.image_size,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        gflops=round(image_tower(loaded.model.config).flops / 1e9, 3),
    )
    space = text_space(loaded, config.precision)

    def embed(texts: Sequence[str]) -> Tensor:
        return cache.features(
            space,
            [content_key(text) for text in texts],
            lambda missing: embed_texts(loaded, [texts[i] for i in missing], precision=config.precision),
        )

    return OpenedModel(name=name, loaded=loaded, facts=facts, text_space=space, embed_texts=embed)
