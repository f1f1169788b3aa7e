"""The image tower made ready to compute many pictures, and what names the features that it yields.

On a CPU many pictures are computed by threads that each take a whole batch on one core: nobody waits for anybody in
the middle of a product, so nothing is lost when the cores are shared with decoding or with other programs.
"""

import copy
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.ahead import map_ahead
from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.embed.space import hash_tower, name_space
from diptych.image import Picture, Preprocess, open_picture
from diptych.model.clip import CLIP
from diptych.model.config import Precision
from diptych.model.precision import choose_precision
from diptych.model.vision import VisionTransformer

Batch = TypeVar("Batch")
Result = TypeVar("Result")

BATCH_SIZE = 64
"""Pictures at a time."""


def embed_images(
    loaded: Loaded, pictures: Iterable[Picture], batch_size: int = BATCH_SIZE, *, precision: Precision = "exact"
) -> Float[Tensor, "N E"]:
    """Pictures (paths, bytes, Pillow pictures, arrays [H, W, 3]) to features: float32, normalised, in their order.

    They are decoded while others are computed. `precision` as in `diptych.model.config`: "auto" is several times as
    fast where bfloat16 is. Raises PictureError for one that cannot be used; sort those out with
    `diptych.image.open_picture` first.
    """
    tower = ImageTower(loaded, precision)
    return torch.cat([torch.empty(0, tower.embed_dim), *encode_pictures(tower, pictures, batch_size)])


class ImageTower:
    """Pictures to normalised features, in one of the precisions. Called from any number of threads.

    With `pooled` the features are those before the projection into the joint space, as they are: what linear probes
    want, and from which `project` makes the others. A ResNet has only one kind.
    """

    def __init__(self, loaded: Loaded, precision: Precision = "auto", *, pooled: bool = False) -> None:
        self.device = loaded.model.logit_scale.device
        self.precision: Precision = choose_precision(precision, self.device)
        self.preprocess: Preprocess = loaded.preprocess
        self.pooled = pooled
        self.embed_dim: int = loaded.model.config.embed_dim
        if pooled and isinstance(visual := loaded.model.visual, VisionTransformer):
            self.embed_dim = visual.proj.shape[0]
        self._visual = _prepare(loaded.model, self.precision)

    def read(self, picture: Picture) -> UInt8[np.ndarray, "3 H W"]:
        """Decode and resize; raises PictureError for what is no usable picture."""
        if self.precision == "exact":
            return self.preprocess.pixels(open_picture(picture))
        with torch.inference_mode():
            return self.preprocess.quick_pixels(picture)

    @torch.inference_mode()
    def encode(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        """What `read` made -> features, normalised, float32 on the CPU."""
        image = self.preprocess.normalize(pixels.to(self.device))
        dtype = torch.bfloat16 if self.precision == "bfloat16" else self._visual.dtype
        features = self._visual(image.to(dtype), self.pooled).float()
        return (features if self.pooled else F.normalize(features, dim=-1)).cpu()

    @property
    def streams(self) -> int:
        """Batches that are best computed at the same time."""
        return count_cores() if self.device.type == "cpu" else 1


class _Visual(nn.Module):
    """An image tower and the type of its weights."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, image: Tensor, pooled: bool = False) -> Tensor:
        if pooled and isinstance(self.tower, VisionTransformer):
            return self.tower.pool(image)
        return self.tower(image)


_PREPARED: WeakKeyDictionary[CLIP, tuple[object, _Visual]] = WeakKeyDictionary()


def _prepare(model: CLIP, precision: Precision) -> _Visual:
    """The tower with weights of that precision; converted once, and again when they have changed."""
    if precision != "bfloat16" or model.dtype == torch.bfloat16:
        return _Visual(model.visual, model.dtype)
    state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in model.visual.state_dict().values())
    kept = _PREPARED.get(model)
    if kept is None or kept[0] != state:
        tower = copy.deepcopy(model.visual).eval().requires_grad_(False).to(torch.bfloat16)
        for module in tower.modules():
            if isinstance(module, nn.BatchNorm2d):  # its statistics span more than eight bits can tell apart
                module.float()
        kept = _PREPARED[model] = state, _Visual(tower, torch.bfloat16)
    return kept[1]


@torch.inference_mode()
def project(loaded: Loaded, pooled: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
    """Features before the projection -> features of the joint space, normalised, float32 on the CPU."""
    visual = loaded.model.visual
    if isinstance(visual, VisionTransformer):
        pooled = pooled.to(visual.proj.device) @ visual.proj.float()
    return F.normalize(pooled, dim=-1).cpu()


def encode_pictures(tower: ImageTower, pictures: Iterable[Picture], batch_size: int) -> Iterator[Float[Tensor, "N E"]]:
    """Features of pictures in order, batch by batch; decoding goes on while the tower computes.

    Raises PictureError for one that cannot be used. A single batch is computed by all cores together.
    """
    remaining = iter(pictures)
    first = list(islice(remaining, batch_size))
    rest = list(islice(remaining, 1))
    if not rest:
        if first:
            pixels = [torch.from_numpy(tower.read(picture)) for picture in first]
            yield tower.encode(torch.stack(pixels))
        return

    def everything() -> Iterator[Picture]:
        yield from first
        yield from rest
        yield from remaining

    threads = tower.streams
    decoded = map_ahead(
        tower.read, everything(), threads=count_cores(), ahead=(threads + 2) * batch_size, prepare=work_alone
    )
    try:
        yield from compute_ahead(tower.encode, _stack(decoded, batch_size), threads)
    finally:
        decoded.close()


def _stack(pixels: Iterator[UInt8[np.ndarray, "3 H W"]], batch_size: int) -> Iterator[UInt8[Tensor, "N 3 H W"]]:
    while some := list(islice(pixels, batch_size)):
        yield torch.from_numpy(np.stack(some))


def compute_ahead(function: Callable[[Batch], Result], batches: Iterable[Batch], streams: int) -> Generator[Result]:
    """`function` of every batch, in order, `streams` of them at a time; one core each if there are several."""
    threads = torch.get_num_threads()
    try:
        yield from map_ahead(
            function, batches, threads=streams, ahead=streams + 1, prepare=work_alone if streams > 1 else None
        )
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself is also what later threads begin with


def work_alone() -> None:
    """Let this thread compute by itself: PyTorch's count of threads belongs to the thread that sets it."""
    torch.set_num_threads(1)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def image_space(loaded: Loaded, precision: Precision, *, pooled: bool = False) -> str:
    """Names the space that image features lie in: equal for equal weights, preprocessing and precision. Features before
    the projection lie in another."""
    model = loaded.model
    resolved = choose_precision(precision, model.logit_scale.device)
    config = to_dict(model.config)
    return name_space(
        kind="pooled image" if pooled else "image",
        weights=hash_tower(model.visual),
        model={key: config[key] for key in ("vision", "embed_dim", "activation")},
        preprocess=to_dict(loaded.preprocess),
        precision=resolved,
    )
