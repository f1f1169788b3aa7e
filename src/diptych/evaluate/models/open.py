"""The models that are evaluated: their names, and what figures need to know of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.layouts import load
from diptych.checkpoint.loaded import Loaded
from diptych.checkpoint.sources import HUB
from diptych.embed.cache import FeatureCache, content_key
from diptych.embed.images import ImageTower, image_space, project
from diptych.embed.texts import embed_texts, text_space
from diptych.errors import UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.models.baselines import BaselineTower, describe, is_baseline, load_baseline
from diptych.evaluate.models.features import ImageModel
from diptych.evaluate.results import ModelFacts
from diptych.model.config import Precision
from diptych.model.cost import image_tower
from diptych.model.device import choose_device
from diptych.ranks import Ranks
from diptych.zeroshot import EmbedTexts

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is ready."""

    name: str
    facts: ModelFacts
    images: ImageModel
    logit_scale: float
    """Scale of the zero-shot logits, already exp(t)."""
    text_space: str
    """Empty: it reads no texts."""
    embed_texts: EmbedTexts
    """Through the cache; UsageError for a model without texts."""
    templates: tuple[str, ...] = ()
    """That its checkpoint names, for datasets that name none."""


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
    if is_baseline(source):
        return re.sub(r"[^\w.-]+", "-", source.partition(":")[2].removeprefix(HUB)).strip("-.")
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "-", source.removeprefix(HUB)).strip("-.")


def open_model(name: str, source: str, config: EvaluateConfig, cache: FeatureCache, ranks: Ranks) -> OpenedModel:
    """Load a model to where it is to be computed."""
    device = choose_device(config.device, ranks)
    if is_baseline(source):
        return _open_baseline(name, source, str(device))
    loaded = load(source, device=device, activation=config.activation, preset=config.preset)
    loaded = loaded.turned() if config.turn else loaded
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
        keys = [content_key(text) for text in texts]
        found = cache.get(space, keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if missing:
            computed = embed_texts(loaded, list(missing.values()), precision=config.precision)
            fresh = dict(zip(missing, computed, strict=True))
            cache.put(space, fresh)
            found |= fresh
        return torch.stack([found[key] for key in keys])

    return OpenedModel(
        name=name,
        facts=facts,
        images=clip_image_model(loaded, config.precision),
        logit_scale=loaded.model.logit_scale.exp().item(),
        text_space=space,
        embed_texts=embed,
        templates=loaded.model.config.templates,
    )


def clip_image_model(loaded: Loaded, precision: Precision) -> ImageModel:
    """The image side of a CLIP."""
    return ImageModel(
        tower=ImageTower(loaded, precision, pooled=True),
        space=image_space(loaded, precision, pooled=True),
        project=partial(project, loaded),
    )


def _open_baseline(name: str, source: str, device: str) -> OpenedModel:
    """A model that is no CLIP: to be probed, and that is all."""
    found = load_baseline(source, device=device)
    tower = BaselineTower(found, device)

    def refuse(_: Sequence[str]) -> Tensor:
        raise UsageError(f"{name} reads no texts; it can be probed: --protocols probe fewshot")

    return OpenedModel(
        name=name,
        facts=replace(describe(found, source, tower.embed_dim), name=name),
        images=ImageModel(tower=tower, space=found.space, project=partial(F.normalize, dim=-1)),
        logit_scale=1.0,
        text_space="",
        embed_texts=refuse,
    )
