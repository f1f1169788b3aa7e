"""What a locked tower makes of every sample, once, on disk.

    CACHE/0f3a.../features.npy   float [rows, E], row for row as the shard's index
                  about.json     hash of features.npy; (row, reason) of pictures that cannot be used

One folder a shard, named by a hash of all that decides its content: the tower's weights, sizes and preprocessing (or
tokenizer), the shard's content, the types. It is written beside its place and renamed, and its content is a function of
its name: batches are cut by row and have one shape, whoever computes them. So a killed run, other ranks or another run
with the same tower find what is done and do the rest, and no result depends on who did what. Files are read through a
memory map; a damaged one is made anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from diptych import files
from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.errors import PictureError, UsageError
from diptych.image import open_picture
from diptych.ranks import Ranks
from diptych.shards.index import ShardIndex
from diptych.shards.loader import Loader, StoredFeatures
from diptych.train.config import StartConfig, TrainConfig
from diptych.train.step import autocast

VERSION = 1
BATCH_SIZE = 64
THREADS = min(8, os.cpu_count() or 1)
FEATURES, ABOUT = "features.npy", "about.json"


def why_not(config: TrainConfig, steps: int, batches_per_epoch: int) -> str | None:
    """Why the locked tower's features are not kept, if so; raises UsageError where they were demanded and cannot be."""
    start = config.start
    if start.lock == "none":
        return "no tower is locked"
    if start.cache_features == "off":
        return "--cache-features off"
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
class Tower:
    """The locked tower at work."""

    loaded: Loaded
    image: bool
    device: torch.device
    dtype: torch.dtype
    """Type of the tower's matrix products."""
    stored: np.dtype[Any]

    def fingerprint(self) -> dict[str, Any]:
        """All that decides a feature, but the sample."""
        model, preprocess, tokenizer = self.loaded
        digest = hashlib.sha256()
        for name, tensor in (model.visual if self.image else model.text).state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        text = {"tokenizer": tokenizer.fingerprint, "special": tokenizer.special_tokens}
        return {
            "version": VERSION,
            "model": to_dict(model.config),
            "weights": digest.hexdigest(),
            "input": to_dict(preprocess) if self.image else text,
            "types": [str(self.dtype), str(self.stored), self.device.type],
        }

    @torch.inference_mode()
    def encode(self, inputs: Tensor) -> np.ndarray:
        """Pixels or tokens of BATCH_SIZE samples -> their normalised features."""
        model, inputs = self.loaded.model, inputs.to(self.device)
        with autocast(self.device, self.dtype):
            if self.image:
                features = model.encode_image(self.loaded.preprocess.normalize(inputs), normalize=True)
            else:
                features = model.encode_text(inputs, normalize=True)
        return features.float().cpu().numpy().astype(self.stored)


def store(
    config: StartConfig, tower: Tower, loader: Loader, ranks: Ranks, say: Callable[[int, int], None] = lambda *_: None
) -> StoredFeatures:
    """Have the features of every sample of the loader; what is missing is computed now, each shard by one rank.

    `say` is told how many shards this rank has done, and of how many.
    """
    folder = config.feature_cache or files.cache_folder("features")
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = tower.fingerprint()
    shards = [shard for source in loader.sources for shard in source.dataset.shards]
    places = [folder / _name(fingerprint, shard) for shard in shards]
    mine = [i for i in ranks.shard(len(shards)) if _open(places[i]) is None]
    rounds = int(ranks.all_reduce_max(float(len(mine))))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="diptych-features") as pool:
        for number in range(rounds):
            if number < len(mine):
                _compute(tower, shards[mine[number]], places[mine[number]], pool)
                say(number + 1, len(mine))
            ranks.barrier()  # after every shard, so that nobody waits longer than one takes
        pairs = zip(shards, places, strict=True)  # another machine's shards are not here if folders are not shared
        opened = [_open(place) or _compute(tower, shard, place, pool) for shard, place in pairs]
    ranks.barrier()
    firsts = np.cumsum([0, *(len(source.dataset.shards) for source in loader.sources)])

    def read(source: int, shard: int, row: int) -> np.ndarray | str:
        features, broken = opened[firsts[source] + shard]
        return broken[row] if row in broken else features[row].astype(np.float32)

    return StoredFeatures(image=tower.image, read=read)


Stored = tuple[np.ndarray, dict[int, str]]


def _name(fingerprint: dict[str, Any], shard: ShardIndex) -> str:
    described = json.dumps([fingerprint, shard.content_hash, len(shard)], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(described.encode())


def _open(place: Path) -> Stored | None:
    """What is there, if it is whole."""
    with suppress(OSError, ValueError, KeyError):
        about = json.loads((place / ABOUT).read_text())
        if files.xxh3(place / FEATURES) == about["xxh3"]:
            features = np.load(place / FEATURES, mmap_mode="r", allow_pickle=False)
            return features, {int(row): reason for row, reason in about["broken"]}
    return None


def _compute(tower: Tower, shard: ShardIndex, place: Path, pool: ThreadPoolExecutor) -> Stored:
    _remove_leftovers(place)
    rows = np.zeros((len(shard), tower.loaded.model.config.embed_dim), dtype=tower.stored)
    broken: list[tuple[int, str]] = []
    for first in range(0, len(shard), BATCH_SIZE):
        count = min(BATCH_SIZE, len(shard) - first)
        inputs = _read_inputs(tower, shard, first, count, pool, broken)
        rows[first : first + count] = tower.encode(inputs)[:count]
    with files.atomic_folder(place) as temporary:
        np.save(temporary / FEATURES, rows, allow_pickle=False)
        files.write_json(temporary / ABOUT, {"xxh3": files.xxh3(temporary / FEATURES), "broken": broken})
    opened = _open(place)
    assert opened is not None
    return opened


def _read_inputs(
    tower: Tower, shard: ShardIndex, first: int, count: int, pool: ThreadPoolExecutor, broken: list[tuple[int, str]]
) -> Tensor:
    """BATCH_SIZE rows from `first` on, with the last one repeated, or black, where there is none."""
    table = shard.table.slice(first, count)
    if not tower.image:
        tokens = tower.loaded.tokenizer(table.column("caption").to_pylist())
        return torch.cat([tokens, tokens[-1:].expand(BATCH_SIZE - count, -1)])
    size = tower.loaded.preprocess.image_size
    pixels = torch.zeros(BATCH_SIZE, 3, size, size, dtype=torch.uint8)
    columns: Sequence[list[Any]] = [table.column(name).to_pylist() for name in ("offset", "size", "xxh3")]
    with open(shard.path, "rb") as tar:
        pictures = pool.map(lambda row: _read_picture(tower, tar.fileno(), *row), zip(*columns, strict=True))
        for i, picture in enumerate(pictures):
            if isinstance(picture, str):
                broken.append((first + i, picture))
            else:
                pixels[i] = picture
    return pixels


def _read_picture(tower: Tower, descriptor: int, offset: int, size: int, xxh3: int) -> Tensor | str:
    data = os.pread(descriptor, size, offset)
    if xxhash.xxh3_64_intdigest(data) != xxh3:
        return "changed"
    try:
        return torch.from_numpy(tower.loaded.preprocess.pixels(open_picture(data)))
    except PictureError as error:
        return error.reason


def _remove_leftovers(place: Path) -> None:
    """Delete what a killed process left half-done of this folder."""
    for leftover in place.parent.glob(f".{place.name}.*.tmp"):
        process = leftover.name.split(".")[2]
        if not (process.isdigit() and Path("/proc", process).exists()):
            shutil.rmtree(leftover, ignore_errors=True)
