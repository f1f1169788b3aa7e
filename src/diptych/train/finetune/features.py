"""Features of every sample by a locked tower, computed once, on disk.

    CACHE/0f3a.../features.npy   float [rows, E], row for row as the shard's index
                  about.json     hash of features.npy; (row, reason) of pictures that cannot be used

One folder a shard, named by a hash of all that decides its content: the tower's weights, sizes and preprocessing (or
tokenizer), the shard's content, the types. It is written beside its place and renamed, and its content is a function of
its name: batches are cut by row and have one shape, whoever computes them. So a killed run, other ranks or another run
with the same tower find what is done and do the rest, and no result depends on who did what. Files are read through a
memory map; a damaged one is rebuilt.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from diptych import files
from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.embed.fingerprint import hash_tower, name_space
from diptych.embed.stream import encode_stream
from diptych.errors import PictureError, UsageError
from diptych.image import open_picture
from diptych.machine import count_cores, read_at
from diptych.ranks import Ranks
from diptych.shards.index import ShardIndex
from diptych.shards.loader import Loader, StoredFeatures
from diptych.train.config import StartConfig, TrainConfig
from diptych.train.step import autocast

VERSION = 2
BATCH_SIZE = 64
FEATURES, ABOUT = "features.npy", "about.json"
_STALE = 24 * 3600.0
"""Seconds after which what is half-written in a shared store is nobody's any more."""


def why_not(config: TrainConfig, steps: int, batches_per_epoch: int) -> str | None:
    """Why the locked tower's features are not kept, if so; raises UsageError where they were demanded and cannot be."""
    start = config.start
    if start.lock == "none":
        return "no tower is locked"
    if start.cache_features == "off":
        return "--cache-features off"
    if start.lock == "text" and config.loader.caption_key is not None:
        if start.cache_features == "on":
            raise UsageError("cache_features on needs one caption a picture, and --caption-key may name several")
        return "a picture may have several captions"
    remote = [source.url for source in config.data if source.url]
    if remote and start.cache_features == "on":
        raise UsageError(
            f"cache_features on needs shards on this machine, and {remote[0]} is not; copy it, or use "
            "--cache-features auto"
        )
    if remote:
        return f"{remote[0]} is not on this machine"
    if start.lock == "image" and config.loader.augment:
        return "pictures are cropped at random, so it never sees the same twice; --no-augment changes that"
    if steps <= batches_per_epoch and start.cache_features == "auto":
        return "the data is passed once"
    return None


@dataclass(frozen=True, kw_only=True)
class LockedTower:
    """The locked tower at work: an `Encoder` of the samples of shards (diptych.embed.stream)."""

    loaded: Loaded
    image: bool
    device: torch.device
    dtype: torch.dtype
    """Type of the tower's matrix products."""
    stored: np.dtype[Any]

    @property
    def space(self) -> str:
        """Names all that decides a feature, but the sample."""
        model, preprocess, tokenizer = self.loaded
        return name_space(
            version=VERSION,
            model=to_dict(model.config),
            weights=hash_tower(model.visual if self.image else model.text),
            input=to_dict(preprocess) if self.image else tokenizer.key,
            types=[str(self.dtype), str(self.stored), self.device.type],
        )

    @property
    def streams(self) -> int:
        """Batches that are best computed at the same time."""
        return count_cores() if self.device.type == "cpu" else 1

    def read(self, sample: Mapping[str, Any]) -> Tensor:
        """Pixels or tokens of a sample; PictureError for what is no usable picture."""
        if not self.image:
            return self.loaded.tokenizer([sample["caption"]])[0]
        with open(sample["path"], "rb") as tar:
            data = read_at(tar.fileno(), sample["size"], sample["offset"])
        if xxhash.xxh3_64_intdigest(data) != sample["xxh3"]:
            raise PictureError("changed", f"not the bytes that {sample['path'].name} was indexed with")
        return torch.from_numpy(self.loaded.preprocess.pixels(open_picture(data)))

    @torch.inference_mode()
    def encode(self, batch: list[Tensor]) -> Tensor:
        """Pixels or tokens of up to BATCH_SIZE samples -> their normalised features; every batch has one shape."""
        padding = [batch[-1]] * (BATCH_SIZE - len(batch))
        model, inputs = self.loaded.model, torch.stack(batch + padding).to(self.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the stream's threads: a few samples alone are computed by whoever asks
        with autocast(self.device, self.dtype):
            if self.image:
                features = model.encode_image(self.loaded.preprocess.normalize(inputs), normalize=True)
            else:
                features = model.encode_text(inputs, normalize=True)
        torch.set_num_threads(threads)
        return features[: len(batch)].float().cpu()


def store(
    config: StartConfig,
    tower: LockedTower,
    loader: Loader,
    ranks: Ranks,
    say: Callable[[int, int], None] = lambda *_: None,
) -> StoredFeatures:
    """Have the features of every sample of the loader; what is missing is computed now, each shard by one rank.

    `say` is told how many shards this rank has done, and of how many.
    """
    folder = config.feature_cache or files.cache_folder("features")
    folder.mkdir(parents=True, exist_ok=True)
    space = tower.space
    shards = [shard for source in loader.sources for shard in source.dataset.shards]
    places = [folder / name_space(space=space, shard=shard.content_hash, rows=len(shard)) for shard in shards]
    mine = [i for i in ranks.shard(len(shards)) if _open(places[i]) is None]
    with closing(_compute(tower, [(shards[i], places[i]) for i in mine])) as computing:
        for number in range(int(ranks.all_reduce_max(float(len(mine))))):
            if number < len(mine):
                next(computing)
                say(number + 1, len(mine))
            ranks.barrier()  # after every shard, so that nobody waits longer than one takes
    opened = {i: found for i, place in enumerate(places) if (found := _open(place)) is not None}
    absent = [i for i in range(len(shards)) if i not in opened]  # those of other machines, if folders are not shared
    with closing(_compute(tower, [(shards[i], places[i]) for i in absent])) as computing:
        opened |= dict(zip(absent, computing, strict=True))
    ranks.barrier()
    firsts = np.cumsum([0, *(len(source.dataset.shards) for source in loader.sources)])

    def read(source: int, shard: int, row: int) -> np.ndarray | str:
        features, broken = opened[firsts[source] + shard]
        return broken[row] if row in broken else features[row].astype(np.float32)

    return StoredFeatures(image=tower.image, read=read)


Stored = tuple[np.ndarray, dict[int, str]]
"""Features by row, and why some rows have none."""


def _open(place: Path) -> Stored | None:
    """Features that are there and whole."""
    with suppress(OSError, ValueError, KeyError):
        about = files.read_json(place / ABOUT)
        if files.xxh3(place / FEATURES) == about["xxh3"]:
            features = np.load(place / FEATURES, mmap_mode="r", allow_pickle=False)
            return features, {int(row): reason for row, reason in about["broken"]}
    return None


def _compute(tower: LockedTower, missing: Sequence[tuple[ShardIndex, Path]]) -> Generator[Stored]:
    """Compute and write one shard after the other; samples are read ahead across their borders."""
    samples = _iter_samples([shard for shard, _ in missing])
    outcomes = encode_stream(tower, samples, batch_size=BATCH_SIZE, group=lambda key: (key[0], key[1] // BATCH_SIZE))
    with closing(outcomes):
        for shard, place in missing:
            rows = np.zeros((len(shard), tower.loaded.model.config.embed_dim), dtype=tower.stored)
            broken: list[tuple[int, str]] = []
            for (_, row), outcome in islice(outcomes, len(shard)):
                if isinstance(outcome, PictureError):
                    broken.append((row, outcome.reason))
                else:
                    rows[row] = outcome.numpy()
            files.remove_leftovers(place.parent, place.name, older_than=_STALE)
            with files.atomic_folder(place) as temporary:
                np.save(temporary / FEATURES, rows, allow_pickle=False)
                files.write_json(temporary / ABOUT, {"xxh3": files.xxh3(temporary / FEATURES), "broken": broken})
            opened = _open(place)
            assert opened is not None
            yield opened


def _iter_samples(shards: Sequence[ShardIndex]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """((shard, row), what the index says of the sample)."""
    for number, shard in enumerate(shards):
        table = shard.table.select(["caption", "offset", "size", "xxh3"])
        for first in range(0, len(shard), BATCH_SIZE):
            for row, sample in enumerate(table.slice(first, BATCH_SIZE).to_pylist(), first):
                yield (number, row), {"path": shard.path, **sample}
