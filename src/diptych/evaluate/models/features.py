"""A dataset's images to features, once: through the cache, on all ranks, and never a number that is none.

Kept are the features before the projection, as the paper's probes want them; those of the joint space are one product
away. An image that cannot be used is counted and left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diptych.embed.cache import FeatureCache, content_key
from diptych.embed.images import ImageTower
from diptych.embed.sources import Row, fetch
from diptych.embed.stream import ImageEncoder, Tower, count_cores, encode_stream
from diptych.errors import DatasetError, PictureError
from diptych.evaluate.datasets.samples import Samples
from diptych.image import Picture, open_picture
from diptych.prefetch import map_ahead
from diptych.ranks import Ranks

CHUNK = 512
"""Images that are looked up in the cache at once, and the share that a rank takes."""
Outcome = Float[Tensor, " D"] | PictureError
"""The feature of an image, or why it has none."""


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Features of a split."""

    kept: tuple[int, ...]
    """Samples that have features, in order."""
    pooled: Float[Tensor, "N D"]
    """Before the projection."""
    joint: Float[Tensor, "N E"]
    """In the space that texts lie in, normalised."""
    skipped: Counter[str]
    """Reason -> images that could not be used."""


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """The image side of a model: a tower, and the projection of its features."""

    tower: Tower
    space: str
    """Equal for equal weights, preprocessing and precision."""
    project: Callable[[Float[Tensor, "N D"]], Float[Tensor, "N E"]]
    """Into the space that texts lie in, normalised."""


class Embedder:
    """An image model behind a cache, its work shared by ranks."""

    def __init__(self, images: ImageModel, cache: FeatureCache, batch_size: int, ranks: Ranks | None = None) -> None:
        self.tower, self.space, self.project = images.tower, images.space, images.project
        self.cache, self.batch_size, self.ranks = cache, batch_size, ranks or Ranks()

    def embed(
        self, samples: Samples, border: int = 0, on_pictures: Callable[[int], None] = lambda _: None
    ) -> SplitFeatures:
        """Features of all samples, on every rank. `border` pixels are cut off each side of an image.

        Raises DatasetError if a feature is not finite.
        """
        outcomes = self._compute(samples, border, on_pictures)
        kept, features, skipped = gather_features(self.ranks, outcomes, self.tower.embed_dim, self.tower.device)
        pooled = features.cpu()
        if len(broken := (~pooled.isfinite().all(dim=1)).nonzero()):
            raise DatasetError(
                f"{samples.path}: the model gives NaN or infinity for {len(broken)} of {len(pooled)} pictures "
                f"(first: {samples.keys[kept[broken[0, 0]]]}); its weights are broken or its precision too low"
            )
        return SplitFeatures(kept=tuple(kept), pooled=pooled, joint=self.project(pooled), skipped=skipped)

    def _is_feature(self, cached: Tensor) -> bool:
        """Whether what the cache holds can be one of this tower's, whoever wrote it."""
        return len(cached) == self.tower.embed_dim and bool(cached.isfinite().all())

    def _compute(self, samples: Samples, border: int, on_pictures: Callable[[int], None]) -> dict[int, Outcome]:
        """Outcomes of this rank's samples; each distinct image that the cache lacks is encoded once."""
        space = f"{self.space} border {border}" if border else self.space
        chunks = self.ranks.shard(math.ceil(len(samples) / CHUNK))
        mine = [i for chunk in chunks for i in range(chunk * CHUNK, min(len(samples), (chunk + 1) * CHUNK))]
        cores = count_cores()
        contents = map_ahead(_read, samples.rows.read(mine), threads=cores, ahead=4 * cores)
        keys: dict[int, bytes | PictureError] = {}
        found: dict[bytes, Outcome] = {}
        asked: set[bytes] = set()

        def iter_misses() -> Iterator[tuple[tuple[int, bytes], bytes]]:
            for start in range(0, len(mine), CHUNK):
                some = dict(zip(mine[start : start + CHUNK], islice(contents, CHUNK), strict=True))
                keys.update({i: one if isinstance(one, PictureError) else one[0] for i, one in some.items()})
                new = dict(one for one in some.values() if not isinstance(one, PictureError) and one[0] not in asked)
                asked.update(new)
                cached = {key: one for key, one in self.cache.get(space, new).items() if self._is_feature(one)}
                found.update(cached)
                yield from (((start, key), content) for key, content in new.items() if key not in cached)
                on_pictures(len(some))

        def read(image: Picture) -> np.ndarray:
            return self.tower.read(cut_border(open_picture(image), border) if border else image)

        encoder, fresh = ImageEncoder(self.tower, read), dict[bytes, Tensor]()
        outcomes = encode_stream(encoder, iter_misses(), batch_size=self.batch_size, group=lambda key: key[0])
        with closing(contents), closing(outcomes):
            for (_, key), outcome in outcomes:
                found[key] = outcome
                if isinstance(outcome, Tensor):
                    fresh[key] = outcome
                if len(fresh) == CHUNK:  # not only at the end: a kill loses a chunk
                    self.cache.put(space, fresh)
                    fresh.clear()
        self.cache.put(space, fresh)
        if isinstance(self.tower, ImageTower):
            self.tower.warn()
        return {i: key if isinstance(key, PictureError) else found[key] for i, key in keys.items()}


class Gathered(NamedTuple):
    """Outcomes of all ranks, in the order of the inputs."""

    kept: list[int]
    """Inputs that have a feature."""
    features: Float[Tensor, "N D"]
    skipped: Counter[str]
    """Reason -> inputs that have none."""


def gather_features(ranks: Ranks, outcomes: Mapping[int, Outcome], width: int, device: torch.device) -> Gathered:
    """Put together on every rank what each has computed; `outcomes` are this rank's, by number of the input."""
    mine = {i: outcome for i, outcome in outcomes.items() if isinstance(outcome, Tensor)}
    features = torch.stack(list(mine.values())) if mine else torch.empty(0, width)
    kept = ranks.gather(torch.tensor(list(mine), dtype=torch.int64, device=device))
    order = kept.argsort()
    everyone = ranks.gather(features.to(device))[order]
    reasons = Counter(outcome.reason for outcome in outcomes.values() if isinstance(outcome, PictureError))
    skipped = sum((Counter(part) for part in ranks.gather_objects(dict(reasons))), Counter[str]())
    return Gathered(kept[order].tolist(), everyone, skipped)


def cut_border(image: Image.Image, border: int) -> Image.Image:
    """Without `border` pixels on each side; PictureError if nothing is left."""
    if min(image.size) <= 2 * border:
        raise PictureError("too_small", f"{image.width} x {image.height} without a border of {border}")
    return image.crop((border, border, image.width - border, image.height - border))


def _read(row: Row) -> tuple[bytes, bytes] | PictureError:
    """Key and content of an image, or why there is none."""
    try:
        content = fetch(row)
    except PictureError as error:
        return error
    assert isinstance(content, bytes)
    return content_key(content), content
