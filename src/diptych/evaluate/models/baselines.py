"""Other models beside CLIP: anything that makes features of pictures, so that Figure 10 has its other rows.

    load_baseline("timm:resnet50")                  a model of timm, with the weights it publishes (the extra `timm`)
    load_baseline("python:my.models:resnet")        a Baseline of one's own, or a function that returns one
    baseline("mine", features, image_size=224)      any function of normalised pictures [N, 3, H, W] -> array [N, D]

A baseline has no texts: it can be probed, on all or on a few labelled pictures, and that is all.
"""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diptych.embed.fingerprint import hash_tower, name_space
from diptych.errors import DownloadError, UsageError
from diptych.evaluate.results import ModelFacts
from diptych.image import Picture, Preprocess, open_picture, to_rgb
from diptych.model.trunk import import_timm

TIMM, PYTHON = "timm:", "python:"
Features = Callable[[Tensor], Tensor | NDArray]


@runtime_checkable
class Baseline(Protocol):
    """A model that is no CLIP; plain attributes will do for the properties."""

    @property
    def name(self) -> str:
        """Name in results and figures."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square that it takes, pixels."""
        ...

    @property
    def space(self) -> str:
        """Equal for equal weights and preprocessing, and for nothing else."""
        ...

    @property
    def parameters(self) -> int | None:
        """How many numbers it has."""
        ...

    @property
    def gflops(self) -> float | None:
        """GFLOPs of one picture, a multiply-add counted as two."""
        ...

    def preprocess(self, image: Image.Image) -> Tensor:
        """A decoded picture to what `features` takes, [3, H, W]."""
        ...

    def features(self, images: Tensor) -> Tensor | NDArray:
        """[N, 3, H, W] to [N, D]: what comes before the last layer, not normalised."""
        ...


@dataclass(frozen=True, kw_only=True)
class FunctionBaseline:
    """A function that became a `Baseline`."""

    name: str
    image_size: int
    space: str
    function: Features
    transform: Callable[[Image.Image], Tensor]
    parameters: int | None = None
    gflops: float | None = None

    def preprocess(self, image: Image.Image) -> Tensor:
        """See `Baseline`."""
        return self.transform(to_rgb(image))

    def features(self, images: Tensor) -> Tensor | NDArray:
        """See `Baseline`."""
        return self.function(images)


def baseline(
    name: str,
    features: Features,
    *,
    image_size: int,
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    version: str = "1",
    parameters: int | None = None,
    gflops: float | None = None,
) -> FunctionBaseline:
    """Make a baseline of a function.

    Without `preprocess` pictures get that of CLIP at this size. `version` has to change when the function or its
    weights do, since features are kept under it; a module is told apart by its weights.
    """
    transform = preprocess or Preprocess(image_size=image_size)
    weights = hash_tower(features) if isinstance(features, nn.Module) else None
    return FunctionBaseline(
        name=name,
        image_size=image_size,
        space=name_space(kind="baseline", name=name, version=version, weights=weights, image_size=image_size),
        function=features,
        transform=transform,
        parameters=parameters,
        gflops=gflops,
    )


def is_baseline(source: str) -> bool:
    """Whether a source names a baseline and not a CLIP."""
    return source.startswith((TIMM, PYTHON))


def load_baseline(source: str, *, device: str = "cpu", pretrained: bool = True) -> Baseline:
    """Load a baseline by what a user calls it; `pretrained=False`: timm's architecture with random weights.

    Raises UsageError for what is not there or is no baseline, DownloadError for weights that cannot be fetched.
    """
    if source.startswith(TIMM):
        return _load_timm(source.removeprefix(TIMM), device, pretrained)
    if source.startswith(PYTHON):
        return _load_python(source.removeprefix(PYTHON))
    raise UsageError(f"{source!r} names no baseline; use timm:NAME (timm:resnet50) or python:MODULE:NAME")


def describe(found: Baseline, source: str, embed_dim: int) -> ModelFacts:
    """Facts for figures, marked as those of a baseline."""
    return ModelFacts(
        name=found.name,
        source=source,
        space=found.space,
        embed_dim=embed_dim,
        image_size=found.image_size,
        parameters=found.parameters,
        gflops=found.gflops,
        baseline=True,
    )


class BaselineTower:
    """A baseline as `diptych evaluate` uses towers: one batch at a time, in the precision that it computes in."""

    precision = "exact"
    streams = 1

    def __init__(self, found: Baseline, device: str) -> None:
        self.found, self.device = found, torch.device(device)
        blank = Image.new("RGB", (found.image_size, found.image_size))
        self.embed_dim = self.encode(found.preprocess(blank).unsqueeze(0)).shape[1]

    def read(self, picture: Picture) -> NDArray[np.float32]:
        """Decode and preprocess; PictureError for what is no usable picture."""
        return self.found.preprocess(open_picture(picture)).numpy()

    def encode(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """Features; UsageError if the model gives anything but one row a picture."""
        return _compute(self.found, pixels, str(self.device))


@torch.inference_mode()
def _compute(found: Baseline, batch: Tensor, device: str) -> Float[Tensor, "N D"]:
    computed = found.features(batch.to(device))
    features = torch.as_tensor(np.asarray(computed) if not isinstance(computed, Tensor) else computed).float().cpu()
    if features.ndim != 2 or len(features) != len(batch):
        raise UsageError(
            f"{found.name} gives an array {list(features.shape)} for {len(batch)} pictures; it has to be "
            f"[{len(batch)}, width]"
        )
    return features


def _load_timm(name: str, device: str, pretrained: bool) -> Baseline:
    """A model of timm without its last layer, and the preprocessing that its weights were published with."""
    timm = import_timm()
    if not name.startswith("hf-hub:") and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() knows the names"
        raise UsageError(f"timm has no model {name!r}; {hint}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except OSError as error:
        raise DownloadError(f"the weights of timm's {name} could not be fetched: {error}") from error
    model = model.eval().requires_grad_(False)
    config = timm.data.resolve_model_data_config(model)
    size = int(config["input_size"][-1])
    gflops = _count_gflops(model, tuple(config["input_size"]))
    described = {key: str(value) for key, value in config.items()}
    return FunctionBaseline(
        name=name.removeprefix("hf-hub:").replace("/", "-"),
        image_size=size,
        space=name_space(kind="timm", name=name, weights=hash_tower(model), preprocess=described),
        function=model.to(device),
        transform=timm.data.create_transform(**config, is_training=False),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gflops=round(gflops, 6),
    )


def _count_gflops(model: nn.Module, shape: tuple[int, ...]) -> float:
    """GFLOPs of one picture, counted while it is computed; a multiply-add counts as two, as everywhere here."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, *shape))
    return counter.get_total_flops() / 1e9


def _load_python(place: str) -> Baseline:
    """module:name, which is a Baseline or a function without arguments that returns one."""
    module_name, colon, name = place.partition(":")
    if not colon or not name:
        raise UsageError(f"python:{place} names nothing; write python:MODULE:NAME")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"python:{place}: {error}; is its folder in PYTHONPATH?") from None
    if name not in vars(module):
        raise UsageError(f"python:{place}: module {module_name} has no {name}")
    found = vars(module)[name]
    if callable(found) and not isinstance(found, Baseline):
        found = found()
    if isinstance(found, type) or not isinstance(found, Baseline):
        raise UsageError(
            f"python:{place} is a {type(found).__name__} and no baseline; make one with "
            "diptych.evaluate.models.baselines.baseline(name, features, image_size=...)"
        )
    return found
