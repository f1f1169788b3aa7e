"""A dataset's pictures to features, once: through the cache, on all ranks, and never a number that is none.

Kept are the features before the projection, as the paper's probes want them; those of the joint space are one product
away. A picture that cannot be used is counted and left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diptych.checkpoint.loaded import Loaded
from diptych.embed.cache import FeatureCache, content_key
from diptych.embed.images import ImageTower, Tower, encode_each, image_space, project
from diptych.embed.sources import Row, fetch
from diptych.embed.stream import count_cores
from diptych.errors import DatasetError, PictureError
from diptych.evaluate.datasets.samples import Samples
from diptych.image import Picture, open_picture
from diptych.model.config import Precision
from diptych.prefetch import map_ahead
from diptych.ranks import Ranks

EmbedTexts = Callable[[Sequence[str]], Tensor]
"""Texts to their features [N, E], normalised."""

CHUNK = 512
"""Pictures that are looked up in the cache at once."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Features of a split."""

    kept: tuple[int, ...]
    """Samples that have features, in order."""
    pooled: Float[Tensor, "N D"]
    """Before the projection."""
    joint: Float[Tensor, "N E"]
    """In the space that texts lie in, normalised."""
    skipped: Counter[str]
    """Reason -> pictures that could not be used."""


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """What a model sees with."""

    tower: Tower
    space: str
    """Equal for equal weights, preprocessing and precision."""
    project: Callable[[Float[Tensor, "N D"]], Float[Tensor, "N E"]]
    """Into the space that texts lie in, normalised."""


def clip_image_model(loaded: Loaded, precision: Precision) -> ImageModel:
    """Those of a CLIP."""
    return ImageModel(
        tower=ImageTower(loaded, precision, pooled=True),
        space=image_space(loaded, precision, pooled=True),
        project=partial(project, loaded),
    )


class Embedder:
    """A model, ready to compute features of pictures."""

    def __init__(self, eyes: ImageModel, cache: FeatureCache, batch_size: int, ranks: Ranks | None = None) -> None:
        self.tower, self.space, self.project = eyes.tower, eyes.space, eyes.project
        self.cache, self.batch_size, self.ranks = cache, batch_size, ranks or Ranks()

    def embed(self, samples: Samples, border: int = 0, on_pictures: Callable[[int], None] | None = None) -> Embedded:
        """Features of all samples, on every rank. `border` pixels are cut off each side of a picture.

        Raises DatasetError if a feature is not finite.
        """
        space = f"{self.space} border {border}" if border else self.space
        rows: list[int] = []
        features = [torch.empty(0, self.tower.embed_dim)]
        skipped = Counter[str]()
        for number in self.ranks.shard(-(-len(samples) // CHUNK)):
            wanted = range(number * CHUNK, min(len(samples), (number + 1) * CHUNK))
            kept, found = self._embed_chunk(space, samples, wanted, border, skipped)
            rows += kept
            features.append(found)
            if on_pictures is not None:
                on_pictures(len(wanted))
        device = self.tower.device
        everyone = self.ranks.gather(torch.tensor(rows, dtype=torch.int64, device=device))
        order = everyone.argsort()
        pooled = self.ranks.gather(torch.cat(features).to(device))[order].cpu()
        kept = everyone[order].tolist()
        if len(broken := (~pooled.isfinite().all(dim=1)).nonzero()):
            raise DatasetError(
                f"{samples.path}: the model gives NaN or infinity for {len(broken)} of {len(pooled)} pictures "
                f"(first: {samples.keys[kept[broken[0, 0]]]}); its weights are broken or its precision too low"
            )
        counts = sum((Counter(part) for part in self.ranks.gather_objects(dict(skipped))), Counter[str]())
        return Embedded(kept=tuple(kept), pooled=pooled, joint=self.project(pooled), skipped=counts)

    def _embed_chunk(
        self, space: str, samples: Samples, wanted: Sequence[int], border: int, skipped: Counter[str]
    ) -> tuple[list[int], Float[Tensor, "N D"]]:
        """Which of the wanted samples have a picture that can be used, and its features."""
        kept, contents = [], []
        read = map_ahead(_read, samples.rows.read(wanted), threads=count_cores(), ahead=4 * count_cores())
        for number, content in zip(wanted, read, strict=True):
            if isinstance(content, str):
                skipped[content] += 1
            else:
                kept.append(number)
                contents.append(content)
        computed: dict[bytes, Tensor] = {}
        while True:
            keys = [content_key(content) for content in contents]
            work = _Work(self.tower, contents, keys, computed, border, self.batch_size)
            try:
                return kept, self.cache.features(space, keys, work)
            except _BrokenPictures as error:
                skipped.update(error.reasons.values())
                left = [i for i in range(len(contents)) if keys[i] not in {keys[b] for b in error.reasons}]
                for i, key in enumerate(keys):  # the same bytes again are the same broken picture
                    again = next((b for b in error.reasons if keys[b] == key and b != i), None)
                    if i not in error.reasons and again is not None:
                        skipped[error.reasons[again]] += 1
                kept, contents = [kept[i] for i in left], [contents[i] for i in left]
                if not kept:
                    return [], torch.empty(0, self.tower.embed_dim)


class _BrokenPictures(Exception):
    """Some of the contents are no pictures; nothing was kept, and what was computed is not lost."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} pictures")
        self.reasons = reasons


@dataclass
class _Work:
    """Computes what the cache lacks."""

    tower: Tower
    contents: Sequence[bytes]
    keys: Sequence[bytes]
    computed: dict[bytes, Tensor]
    border: int
    batch_size: int

    def __call__(self, missing: list[int]) -> Float[Tensor, "n D"]:
        todo = [i for i in missing if self.keys[i] not in self.computed]
        reasons: dict[int, str] = {}
        pictures = (self.contents[i] for i in todo)
        with closing(encode_each(self.tower, pictures, self.batch_size, self._read)) as features:
            for i, feature in zip(todo, features, strict=True):
                if isinstance(feature, PictureError):
                    reasons[i] = feature.reason
                else:
                    self.computed[self.keys[i]] = feature
        if reasons:
            raise _BrokenPictures(reasons)
        if not missing:
            return torch.empty(0, self.tower.embed_dim)
        return torch.stack([self.computed[self.keys[i]] for i in missing])

    def _read(self, picture: Picture) -> np.ndarray:
        return self.tower.read(cut_border(open_picture(picture), self.border) if self.border else picture)


def cut_border(image: Image.Image, border: int) -> Image.Image:
    """Without `border` pixels on each side; PictureError if nothing is left."""
    if min(image.size) <= 2 * border:
        raise PictureError("too_small", f"{image.width} x {image.height} without a border of {border}")
    return image.crop((border, border, image.width - border, image.height - border))


def _read(row: Row) -> bytes | str:
    """The bytes of a picture, or why there are none."""
    try:
        data = fetch(row)
    except PictureError as error:
        return error.reason
    assert isinstance(data, bytes)
    return data
