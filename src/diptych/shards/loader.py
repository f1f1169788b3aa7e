"""Shards to batches, exactly: the same batches for any number of workers or ranks, from any position.

Batch b of an epoch is the positions [b B, (b + 1) B) of `EpochOrder`; rank r of W takes its W-th of them. Crops, and
the caption of a picture that has several, are drawn from a hash of (seed, epoch, position). So a batch is a pure
function of its number, workers only decide who computes it, and resuming is an addition. What is left at the end of an
epoch, less than a batch, is not used.

A picture that does not decode, or is not the bytes that were indexed, gives its place to the next row of the same
source and is named in `Batch.skipped`; with `strict` it ends the run. A sample that was deleted gives its place up in
the same way, `strict` or not.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diptych import files
from diptych.errors import PictureError, ShardError, UsageError
from diptych.image import Crop, read_crop
from diptych.prefetch import map_ahead
from diptych.shards.cache import Fetcher, ShardCache
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import Dataset, load_dataset
from diptych.shards.order import EpochOrder, Place, SourceOrder, derive_seed, uniforms
from diptych.shards.remote import RemoteDataset, open_remote, require_room
from diptych.shards.tombstones import DELETED, TOMBSTONES_FILE

PREFETCH_BYTES = 2 << 30
"""Batches that are kept ready take no more than this, unless one alone does."""

MAX_OPEN_SHARDS = 64
"""Shards of a source that are open at the same time: a process may have a few hundred files open in all."""

MAX_CONSECUTIVE_BROKEN = 100
"""Broken neighbours in a row after which a dataset is not skipped through any further."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has read: all that is needed to go on, with any number of workers or ranks."""

    epoch: int = 0
    samples_consumed: int = 0
    """In this epoch."""
    seed: int
    dataset_hash: str
    batch_size: int
    """Global."""


@dataclass(frozen=True)
class Batch:
    """What a training step takes."""

    image: UInt8[Tensor, "N 3 H W"]
    text: Int[Tensor, "N L"]
    position: Position
    """Behind this batch: where a run goes on after it."""
    keys: tuple[str, ...]
    pictures: tuple[int, ...]
    """XXH3-64 of each picture's file: equal for copies, whatever crop is taken of them."""
    skipped: tuple[tuple[str, str], ...]
    """(key, reason) of pictures that could not be used and were stood in for."""
    image_features: Float[Tensor, "N E"] | None = None
    """Features by a locked image tower that has seen the data before; `image` has no pixels then."""
    text_features: Float[Tensor, "N E"] | None = None
    """Features by a locked text tower."""


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """What a tower that does not change made of every sample."""

    image: bool
    """Whether features of the pictures are stored, which need not be decoded any more; else of the captions."""
    read: Callable[[int, int, int], Float[np.ndarray, " E"] | str]
    """(source, shard, row) -> the feature, or the reason why that picture cannot be used."""


class Loader:
    """An endless iterable of batches.

    `tokenize` maps captions to token ids [N, L]; `image_size` is the side of the crops. `prepare` makes pixels of an
    encoded picture where the config wants no augmentation; `stored` has features of one tower.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        config: LoaderConfig,
        image_size: int,
        tokenize: Callable[[list[str]], Int[Tensor, "N L"]],
        *,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[bytes], UInt8[np.ndarray, "3 H W"]] | None = None,
        stored: StoredFeatures | None = None,
    ) -> None:
        if not config.augment and prepare is None:
            raise UsageError("augment is off, but nothing says how a picture is prepared then; use augment, or prepare")
        if not sources:
            raise UsageError("no data was named; give at least one folder of shards")
        if config.batch_size % world_size:
            raise UsageError(f"batch_size {config.batch_size} does not divide among {world_size} ranks")
        self.config = config
        self.image_size = image_size
        self.tokenize = tokenize
        self.prepare = None if config.augment else prepare
        self.stored = stored
        self.rank, self.world_size = rank, world_size
        self.sources = _open_sources(sources, config)
        if config.strict:
            _require_whole(self.sources)
        weights = [source.weight for source in sources]
        self.order = EpochOrder([source.order for source in self.sources], weights, config.seed)
        self.dataset_hash = _hash_sources(self.sources, weights)
        if self.order.samples < config.batch_size:
            raise UsageError(
                f"the data holds {self.order.samples} samples an epoch, less than one batch of {config.batch_size}; "
                "use a smaller batch_size"
            )
        self.position = Position(seed=config.seed, dataset_hash=self.dataset_hash, batch_size=config.batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples seen in an epoch: whole batches only."""
        return self.batches_per_epoch * self.config.batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.order.samples // self.config.batch_size

    @property
    def prefetch(self) -> int:
        """Batches kept ready: as many as were asked for and PREFETCH_BYTES hold, at least one."""
        batch_bytes = self.config.batch_size // self.world_size * 3 * self.image_size**2
        return max(1, min(self.config.prefetch, PREFETCH_BYTES // batch_bytes))

    def seek(self, position: Position) -> None:
        """Go on behind a stored position; it must belong to the same data, seed and batch size."""
        for field in ("dataset_hash", "seed", "batch_size"):
            given, ours = getattr(position, field), getattr(self.position, field)
            if given != ours:
                raise UsageError(
                    f"the stored position has {field} {given}, this run has {ours}; "
                    "resume with the data and settings the run was started with"
                )
        self.position = position

    def __iter__(self) -> Generator[Batch]:
        """Batches from `position` on. Close the iterator to stop its workers."""
        if self.config.workers:
            batches = map_ahead(self.read_batch, self._positions(), threads=self.config.workers, ahead=self.prefetch)
        else:
            batches = (self.read_batch(position) for position in self._positions())
        try:
            with contextlib.closing(batches):
                for batch in batches:
                    self.position = batch.position
                    yield batch
        finally:
            for source in self.sources:
                source.rest()

    def _positions(self) -> Iterator[Position]:
        position = self.position
        while True:
            yield position
            position = self._behind(position)

    def read_batch(self, position: Position) -> Batch:
        """Read this rank's share of the batch at a position: a pure function, called from any thread."""
        share = self.config.batch_size // self.world_size
        first = position.samples_consumed + self.rank * share
        places = np.arange(first, first + share, dtype=np.int64)
        draws = uniforms(derive_seed("crop", self.config.seed, position.epoch), places, 3)
        choices = uniforms(derive_seed("caption", self.config.seed, position.epoch), places, 1)
        of_image = self.stored is not None and self.stored.image
        pixels = 0 if of_image else self.image_size
        image = np.empty((share, 3, pixels, pixels), dtype=np.uint8)
        captions, keys, pictures, skipped, features = [], [], [], [], []
        chosen = [self.order.place(position.epoch, int(place)) for place in places]
        with self._at_hand(chosen):
            for i in range(share):
                side = self.config.min_crop + (1 - self.config.min_crop) * draws[i, 0]
                crop = Crop(side=side, left=draws[i, 1], top=draws[i, 2])
                sample = self._read_sample(chosen[i], crop, skipped)
                if sample.image is not None:
                    image[i] = sample.image
                if sample.feature is not None:
                    features.append(sample.feature)
                captions.append(self._choose_caption(sample.caption, float(choices[i, 0])))
                keys.append(sample.key)
                pictures.append(sample.xxh3)
        return Batch(
            image=torch.from_numpy(image),
            text=self.tokenize(captions),
            position=self._behind(position),
            keys=tuple(keys),
            pictures=tuple(pictures),
            skipped=tuple(skipped),
            image_features=torch.from_numpy(np.stack(features)) if of_image else None,
            text_features=torch.from_numpy(np.stack(features)) if features and not of_image else None,
        )

    @contextlib.contextmanager
    def _at_hand(self, places: list[Place]) -> Generator[None]:
        """Each source knows what a batch takes of it while the batch is made."""
        with contextlib.ExitStack() as stack:
            for number, source in enumerate(self.sources):
                mine = [place for place in places if place.source == number]
                if mine:
                    stack.enter_context(source.at_hand(mine))
            yield

    def _choose_caption(self, caption: str, draw: float) -> str:
        if self.config.caption_key is None:
            return caption
        several = caption.split("\n")
        return several[int(draw * len(several))]

    def _read_sample(self, chosen: Place, crop: Crop, skipped: list[tuple[str, str]]) -> "_Sample":
        source = self.sources[chosen.source]
        row, broken = chosen.row, 0
        while broken < MAX_CONSECUTIVE_BROKEN:
            try:
                return self._read_row(chosen.source, row, crop)
            except PictureError as error:
                skipped.append((source.key(row), error.reason))
                if error.reason != DELETED:  # that is no defect, and may be true of a whole shard
                    broken += 1
                    if self.config.strict:
                        raise ShardError(f"sample {source.key(row)} in {source.dataset.path}: {error}") from None
            row = (row + 1) % source.order.samples
        raise ShardError(
            f"{MAX_CONSECUTIVE_BROKEN} broken pictures in a row in {source.dataset.path}; the last: {skipped[-1]}"
        )

    def _read_row(self, number: int, row: int, crop: Crop) -> "_Sample":
        source, feature = self.sources[number], None
        if self.stored is not None:
            feature = self.stored.read(number, *source.order.locate(row))
            if isinstance(feature, str):
                raise PictureError(feature, "when the features of its shard were made")
            if self.stored.image:
                return source.describe(row, feature)
        sample = source.read(row, self.prepare or (lambda data: read_crop(data, crop, self.image_size)))
        return sample if feature is None else replace(sample, feature=feature)

    def _behind(self, position: Position) -> Position:
        consumed = position.samples_consumed + self.config.batch_size
        if consumed + self.config.batch_size > self.order.samples:
            return replace(position, epoch=position.epoch + 1, samples_consumed=0)
        return replace(position, samples_consumed=consumed)


@dataclass(frozen=True)
class _Sample:
    key: str
    caption: str
    xxh3: int
    image: UInt8[np.ndarray, "3 H W"] | None
    feature: Float[np.ndarray, " E"] | None = None


class _Source:
    """One dataset at hand: its order, its columns and its open files, fetched by `fetcher` if they lie elsewhere."""

    def __init__(self, dataset: Dataset, order: SourceOrder, fetcher: Fetcher | None = None) -> None:
        self.dataset, self.order, self.fetcher = dataset, order, fetcher
        self._columns = [
            {name: shard.table.column(name) for name in ("key", "caption", "offset", "size", "xxh3")}
            for shard in dataset.shards
        ]
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int, prepare: Callable[[bytes], UInt8[np.ndarray, "3 H W"]]) -> _Sample:
        shard, local = self.order.locate(row)
        columns = self._columns[shard]
        key = columns["key"][local].as_py()
        self._refuse_deleted(key)
        data = self._pread(shard, columns["size"][local].as_py(), columns["offset"][local].as_py())
        xxh3 = xxhash.xxh3_64_intdigest(data)
        if xxh3 != columns["xxh3"][local].as_py():
            raise PictureError("changed", f"not the bytes that {self.dataset.shards[shard].path.name} was indexed with")
        return _Sample(key, columns["caption"][local].as_py(), xxh3, prepare(data))

    def describe(self, row: int, feature: Float[np.ndarray, " E"]) -> _Sample:
        """What the index knows of a sample whose picture is not needed."""
        shard, local = self.order.locate(row)
        columns = self._columns[shard]
        key, caption, xxh3 = (columns[name][local].as_py() for name in ("key", "caption", "xxh3"))
        self._refuse_deleted(key)
        return _Sample(key, caption, xxh3, None, feature)

    def _refuse_deleted(self, key: str) -> None:
        if key in self.dataset.deleted:
            raise PictureError(DELETED, f"named by {TOMBSTONES_FILE}")

    def key(self, row: int) -> str:
        shard, local = self.order.locate(row)
        return self._columns[shard]["key"][local].as_py()

    @contextlib.contextmanager
    def at_hand(self, places: list[Place]) -> Generator[None]:
        """Shards of these places stay here."""
        if self.fetcher is None:
            yield
            return
        first = min(place.position for place in places)
        with self.fetcher.reading(first, {self.order.locate(place.row)[0] for place in places}):
            yield

    def rest(self) -> None:
        """Nothing is read for now."""
        if self.fetcher is not None:
            self.fetcher.close()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if self.fetcher is not None:
            return os.pread(self.fetcher.descriptor(shard), size, offset)
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self.dataset.shards[shard].path)
            self._files[shard] = file  # last: the one that was read most lately
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
        return os.pread(file.descriptor, size, offset)


class _OpenFile:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open_sources(configs: Sequence[SourceConfig], config: LoaderConfig) -> list[_Source]:
    cache = None
    if any(source.url for source in configs):
        cache = ShardCache(config.cache or files.cache_folder("shards"), config.cache_bytes)
    remote: list[RemoteDataset] = []
    sources: list[_Source] = []
    for source in configs:
        if source.path is not None:
            dataset = load_dataset(source.path, caption_key=config.caption_key)
            sources.append(_Source(dataset, SourceOrder(dataset.sizes, dataset.content_hash, config.seed)))
        elif source.url is not None and cache is not None:
            remote.append(open_remote(source.url, cache, config.caption_key))
            dataset = remote[-1].dataset
            order = SourceOrder(dataset.sizes, dataset.content_hash, config.seed)
            sources.append(_Source(dataset, order, Fetcher(cache, remote[-1].shards, dataset.shards, order)))
    if cache is not None:
        require_room(remote, cache)
    return sources


def _require_whole(sources: list[_Source]) -> None:
    for source in sources:
        for shard, key, reason in source.dataset.skipped:
            raise ShardError(f"sample {key} in {source.dataset.path}, shard {shard}: {reason}")


def _hash_sources(sources: list[_Source], weights: list[float]) -> str:
    parts: list[Any] = [(source.dataset.content_hash, weight) for source, weight in zip(sources, weights, strict=True)]
    return f"{derive_seed('sources', parts):016x}"
