"""The start of fine-tuning: a checkpoint, and which of its weights may change at which rate."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from diptych.checkpoint import layouts
from diptych.checkpoint.formats import native
from diptych.checkpoint.loaded import Loaded, Opened, build
from diptych.errors import UsageError
from diptych.model.clip import CLIP
from diptych.model.config import ResNetConfig, TextConfig, ViTConfig
from diptych.train.config import StartConfig, TrainConfig

_BLOCK = re.compile(r"\.transformer\.resblocks\.(\d+)\.")
_STAGE = re.compile(r"^visual\.layer(\d)\.")
_HEADS = ("proj", "ln_post", "ln_final", "text_projection", "attnpool")
"""Modules behind the last layer of a tower."""


def open_start(out: Path, model: str, start: StartConfig) -> Opened:
    """Look into the run's newest checkpoint, else into what it starts from; a run goes on when its start has gone."""
    newest = native.newest_valid(out)[0] if out.is_dir() else None
    if newest is not None:
        return native.open_folder(newest)
    return layouts.open_checkpoint(model, activation=start.activation, preset=start.preset)


def load_start(config: TrainConfig) -> Loaded | None:
    """The model that a run starts from with what belongs to it; None for one from scratch."""
    if config.start_model is None:
        return None
    opened = open_start(config.out, config.start_model, config.start)
    if opened.config != config.model:
        raise UsageError(
            f"{opened.path} holds a model of other sizes than this run's; name the model that the run was started with"
        )
    return build(opened)


def lock(model: CLIP, start: StartConfig) -> None:
    """Take the locked tower's weights out of training: no gradient, and so no optimizer state."""
    if start.lock != "none":
        (model.visual if start.lock == "image" else model.text).requires_grad_(False)


def choose_lr_scales(model: CLIP, layer_decay: float) -> dict[str, float]:
    """The share of the learning rate of every weight that is trained, by name.

    Projections and the temperature learn at the whole rate, the top layer at `layer_decay` of it, the one below at
    its square, and embeddings and stems, below all layers, at the least. A layer is a Transformer block, or one of the
    four stages of a ResNet.
    """
    layers = {"visual": _depth(model, "visual"), "text": _depth(model, "text")}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layer_decay == 1:
        return dict.fromkeys(trained, 1.0)
    for tower, depth in layers.items():
        if depth is None and any(name.startswith(f"{tower}.") for name in trained):
            raise UsageError(f"--layer-decay counts layers, and those of this {tower} tower are another library's")
    return {name: layer_decay ** _from_top(name, layers) for name in trained}


def _depth(model: CLIP, tower: str) -> int | None:
    config = model.config.text if tower == "text" else model.config.vision
    if isinstance(config, TextConfig | ViTConfig):
        return config.layers
    return len(config.layers) if isinstance(config, ResNetConfig) else None


def _from_top(name: str, layers: Mapping[str, int | None]) -> int:
    """0 for what stands behind all layers, 1 for the top one, ..., one more than there are layers for the stem."""
    tower, _, inside = name.partition(".")
    depth = layers.get(tower)
    if depth is None or inside.split(".")[0] in _HEADS:
        return 0
    if (block := _BLOCK.search(name)) is not None:
        return depth - int(block[1])
    if (stage := _STAGE.search(name)) is not None:
        return depth + 1 - int(stage[1])
    return depth + 1


def count_trained(model: nn.Module) -> tuple[int, int]:
    """Numbers that are trained, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
