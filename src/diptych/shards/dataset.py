"""A dataset: a list of shards with exact counts and one hash, whoever wrote them."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from diptych.errors import NotFoundError, ShardError
from diptych.pair import Pair
from diptych.shards.index import ShardIndex, load_index
from diptych.shards.tombstones import read_tombstones

DATASET_FILE = "dataset.json"
DATASET_VERSION = 1


@dataclass(frozen=True)
class Dataset:
    """Shards in name order."""

    path: Path | str
    """Where it lies; a URL if it lies elsewhere."""
    shards: tuple[ShardIndex, ...]
    deleted: frozenset[str] = frozenset()
    """Keys of samples that are left out when the dataset is read; they keep their place in the order."""

    @classmethod
    def from_indexes(
        cls, path: Path | str, indexes: list[ShardIndex], deleted: frozenset[str] = frozenset()
    ) -> "Dataset":
        """Put indexes together; raises ShardError if no sample is left."""
        if not sum(len(index) for index in indexes):
            reasons = Counter(reason for index in indexes for _, reason in index.skipped)
            raise ShardError(f"{path} holds no usable sample; skipped: {dict(reasons) or 'nothing found'}")
        if deleted and all(key.as_py() in deleted for index in indexes for key in index.table.column("key")):
            raise ShardError(f"every sample of {path} was deleted")
        return cls(path, tuple(indexes), deleted)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [shards]."""
        return np.array([len(shard) for shard in self.shards], dtype=np.int64)

    @cached_property
    def content_hash(self) -> str:
        """Hash of all samples in order; independent of where the dataset lies."""
        return xxhash.xxh3_128_hexdigest(" ".join(shard.content_hash for shard in self.shards).encode())

    @property
    def skipped(self) -> Iterator[tuple[str, str, str]]:
        """(shard, key, reason) of every sample that the indexes had to leave out."""
        for shard in self.shards:
            for key, reason in shard.skipped:
                yield shard.path.name, key, reason

    @property
    def captions(self) -> Iterator[str]:
        """All captions but those of deleted samples, in order."""
        for shard in self.shards:
            for key, caption in zip(shard.table["key"].to_pylist(), shard.table["caption"].to_pylist(), strict=True):
                if key not in self.deleted:
                    yield caption

    @property
    def pairs(self) -> Iterator[Pair]:
        """All pairs with their pictures but the deleted ones, in order, one shard open at a time."""
        for shard in self.shards:
            with open(shard.path, "rb") as tar:
                for row in shard.table.to_pylist():
                    if row["key"] in self.deleted:
                        continue
                    tar.seek(row["offset"])
                    details = {key: str(value) for key, value in json.loads(row["details"]).items()}
                    image = tar.read(row["size"])
                    yield Pair(key=row["key"], caption=row["caption"], image=image, details=details)


def load_dataset(path: Path | str) -> Dataset:
    """Open a folder of shards, or a single tar.

    A folder with a dataset.json is held to it: a missing or changed shard raises ShardError. Any other folder is
    taken as a set of foreign tars in name order.
    """
    path = Path(path)
    if path.is_file():
        return Dataset.from_indexes(path, [load_index(path)], read_tombstones(path.parent))
    if not path.is_dir():
        raise NotFoundError(f"no such dataset: {path} (a folder of .tar shards, or one .tar)")
    if (path / DATASET_FILE).exists():
        return _load_described(path)
    shards = sorted(path.glob("*.tar"))
    if not shards:
        raise NotFoundError(f"no .tar shards in {path}")
    return Dataset.from_indexes(path, [load_index(shard) for shard in shards], read_tombstones(path))


def describe(dataset: Dataset) -> dict[str, Any]:
    """The content of dataset.json."""
    return {
        "format": "diptych shards",
        "version": DATASET_VERSION,
        "samples": len(dataset),
        "hash": dataset.content_hash,
        "shards": [
            {"name": shard.path.name, "samples": len(shard), "bytes": shard.path.stat().st_size}
            for shard in dataset.shards
        ],
    }


def _load_described(path: Path) -> Dataset:
    try:
        description = json.loads((path / DATASET_FILE).read_text())
        if description["version"] != DATASET_VERSION:
            raise ShardError(f"{path / DATASET_FILE} has version {description['version']}, not {DATASET_VERSION}")
        names, expected_hash = [shard["name"] for shard in description["shards"]], description["hash"]
        sizes = [shard["bytes"] for shard in description["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path / DATASET_FILE} is damaged ({error!r}); write the dataset again") from None
    for name, size in zip(names, sizes, strict=True):
        shard = path / name
        if not shard.is_file():
            raise ShardError(f"shard {name} is missing from {path}; {DATASET_FILE} lists it")
        if shard.stat().st_size != size:
            raise ShardError(f"shard {shard} has {shard.stat().st_size} bytes, not {size}; copy it again")
    dataset = Dataset.from_indexes(path, [load_index(path / name) for name in names], read_tombstones(path))
    if dataset.content_hash != expected_hash:
        raise ShardError(f"the samples in {path} are not those that {DATASET_FILE} describes; copy the folder again")
    return dataset
