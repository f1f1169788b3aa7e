"""The image tower made ready to compute many pictures, and the name of the space that its features lie in.

On a CPU many pictures are computed by threads that each take a whole batch on one core: nobody waits for anybody in
the middle of a product, so nothing is lost when the cores are shared with decoding or with other programs.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.decode import ODDITIES, find_oddities, read_file
from diptych.embed.fingerprint import hash_tower, name_space
from diptych.embed.stream import ImageEncoder, Tower, best_streams, encode_stream
from diptych.errors import CheckpointError, PictureError, PictureWarning, UsageError
from diptych.image import Picture, open_picture
from diptych.model.config import Precision
from diptych.model.inference.precision import Resolved, choose_precision
from diptych.model.inference.vision import Encode, get_encoder

BATCH_SIZE = 64
"""Pictures at a time."""


def embed_images(
    loaded: Loaded, pictures: Iterable[Picture], batch_size: int = BATCH_SIZE, *, precision: Precision = "exact"
) -> Float[Tensor, "N E"]:
    """Pictures (paths, bytes, Pillow pictures, arrays [H, W, 3]) to features: float32, normalised, in their order.

    They are decoded while others are computed. `precision` as in `diptych.model.config`: "auto" is several times as
    fast where bfloat16 is. Raises PictureError, which names it, for one that cannot be used; sort those out with
    `diptych.image.open_picture` first.
    """
    features, names = [], list[str]()
    for feature in encode_each(ImageTower(loaded, precision), remember_names(pictures, names), batch_size):
        if isinstance(feature, PictureError):
            raise feature.of(names[len(features)])
        features.append(feature)
    return torch.stack(features) if features else torch.empty(0, loaded.model.config.embed_dim)


def remember_names(pictures: Iterable[Picture], names: list[str]) -> Iterator[Picture]:
    """The pictures; on the way each gets a name for messages: its path, or its number."""
    if isinstance(pictures, str | bytes | Path | Image.Image):
        raise UsageError("pictures are a list, of one if there is only one: [picture]")
    for number, picture in enumerate(pictures):
        names.append(str(picture) if isinstance(picture, str | Path) else f"picture {number}")
        yield picture


def require_finite(features: Tensor) -> Tensor:
    """The features; CheckpointError if the weights gave NaN or infinity."""
    if not features.isfinite().all():
        raise CheckpointError(
            "the model's features are not finite: its weights are broken; `diptych verify` says which"
        )
    return features


class ImageTower:
    """Pictures to normalised features, in one of the precisions. Called from any number of threads.

    With `pooled` the features are those before the projection into the joint space, as they are: what linear probes
    want, and from which `project` makes the others. A ResNet has only one kind.
    """

    def __init__(self, loaded: Loaded, precision: Precision = "auto", *, pooled: bool = False) -> None:
        model, self.preprocess = loaded.model, loaded.preprocess
        self.device = model.logit_scale.device
        self.precision: Resolved = choose_precision(precision, self.device)
        self.embed_dim: int = model.visual.pooled_width if pooled else model.config.embed_dim
        self._project = None if pooled else partial(project, loaded)
        self.oddities, self._lock = Counter[str](), Lock()
        self._encode: Encode = get_encoder(model.visual, self.precision, self.preprocess.mean, self.preprocess.std)

    def read(self, picture: Picture) -> UInt8[np.ndarray, "3 H W"]:
        """Decode and resize; raises PictureError for what is no usable picture."""
        if isinstance(picture, str | Path):
            picture = read_file(Path(picture))
        if isinstance(picture, bytes) and (odd := find_oddities(picture)):
            with self._lock:
                self.oddities.update(odd)
        if self.precision == "exact":
            return self.preprocess.pixels(open_picture(picture))
        with torch.inference_mode():
            return self.preprocess.quick_pixels(picture)

    @torch.inference_mode()
    def encode(self, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        """What `read` made -> features, float32 on the CPU: normalised, or `pooled`."""
        pooled = self._encode(pixels)
        return pooled.cpu() if self._project is None else self._project(pooled)

    @property
    def streams(self) -> int:
        """Batches that are best computed at the same time."""
        return best_streams(self.device)

    def warn(self) -> None:
        """Say once how many of the pictures read so far are not seen as people see them."""
        with self._lock:
            seen, self.oddities = self.oddities, Counter()
        if self.preprocess.turn:
            del seen["turned"]
        for name, count in seen.items():
            remedy = " (--turn, or Loaded.turned(), applies it)" if name == "turned" else ""
            warnings.warn(f"pictures with {ODDITIES[name]}: {count:,}{remedy}", PictureWarning, stacklevel=2)


@torch.inference_mode()
def project(loaded: Loaded, pooled: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
    """Features before the projection -> features of the joint space, normalised, float32 on the CPU."""
    model = loaded.model
    return F.normalize(model.visual.project(pooled.to(model.logit_scale.device)), dim=-1).cpu()


def encode_each(
    tower: Tower,
    pictures: Iterable[Any],
    batch_size: int = BATCH_SIZE,
    *,
    fetch: Callable[[Any], Picture] | None = None,
) -> Generator[Float[Tensor, " E"] | PictureError]:
    """The feature of each picture, or why it has none, in order; see `diptych.embed.stream`. `fetch` brings the picture
    of each item, where items are no pictures."""
    encoder = ImageEncoder(tower, fetch and (lambda item: tower.read(fetch(item))))
    with closing(encode_stream(encoder, enumerate(pictures), batch_size=batch_size)) as outcomes:
        for _, outcome in outcomes:
            yield outcome
    if isinstance(tower, ImageTower):
        tower.warn()


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
