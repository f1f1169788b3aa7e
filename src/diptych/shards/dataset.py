"""A dataset: a list of shards with exact counts and one hash, whoever wrote them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from diptych import files
from diptych.errors import NotFoundError, ShardError
from diptych.pair import Pair
from diptych.shards.index import ShardIndex, load_index
from diptych.shards.tombstones import read_tombstones

DATASET_FILE = "dataset.json"
DATASET_VERSION = 1
MAX_NAME_BYTES = 180
"""Bytes of a shard's name, beside which others of almost the same name have to be written."""


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
            raise ShardError(f"{path} holds no usable sample: {_explain(path, reasons)}")
        if deleted and all(key.as_py() in deleted for index in indexes for key in index.table.column("key")):
            raise ShardError(f"every sample of {path} was deleted")
        return cls(path, tuple(indexes), deleted)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def choose_captions(self, name: str) -> "Dataset":
        """The same with the captions under a name of the samples' JSON."""
        return Dataset.from_indexes(self.path, [shard.choose_captions(name) for shard in self.shards], self.deleted)

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
        """All captions but those of deleted samples, in order; all of a picture that has several."""
        for shard in self.shards:
            for key, caption in zip(shard.table["key"].to_pylist(), shard.table["caption"].to_pylist(), strict=True):
                if key not in self.deleted:
                    yield from caption.split("\n") if shard.several else [caption]

    @property
    def pairs(self) -> Iterator[Pair]:
        """All pairs with their pictures but the deleted ones, in order, one shard open at a time; of several captions
        the first."""
        for shard in self.shards:
            with open(shard.path, "rb") as tar:
                for row in shard.table.to_pylist():
                    if row["key"] in self.deleted:
                        continue
                    tar.seek(row["offset"])
                    details = {key: str(value) for key, value in files.parse_json(row["details"]).items()}
                    image = tar.read(row["size"])
                    caption = row["caption"].partition("\n")[0] if shard.several else row["caption"]
                    yield Pair(key=row["key"], caption=caption, image=image, details=details)


def load_dataset(path: Path | str, *, caption_key: str | None = None, captionless: bool = False) -> Dataset:
    """Open a folder of shards, a single tar, or several by a range or a glob (`shards/{00000..00099}.tar`).

    A folder with a dataset.json is held to it: a missing or changed shard raises ShardError. Any other folder is
    taken as a set of foreign tars in name order. Captions are those under `caption_key` of the samples' JSON, where
    one is given; with `captionless`, samples of foreign tars need none.
    """
    path = Path(path)
    if path.is_dir() and (path / DATASET_FILE).exists():
        dataset = _load_described(path)
        return dataset if caption_key is None else dataset.choose_captions(caption_key)
    shards = _find_shards(path)
    indexes = [load_index(shard, captionless=captionless or caption_key is not None) for shard in shards]
    deleted = frozenset[str]().union(*(read_tombstones(folder) for folder in {shard.parent for shard in shards}))
    if caption_key is not None:
        indexes = [index.choose_captions(caption_key) for index in indexes]
    return Dataset.from_indexes(path, indexes, deleted)


def _find_shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        if shards := sorted(path.glob("*.tar")):
            return shards
        raise NotFoundError(f"no .tar shards in {path}{_name_others(path)}")
    named = [Path(name) for name in files.spell_out(str(path))]
    shards = [shard for shard in named if shard.suffix == ".tar"]
    if named == [path] or not shards:
        raise NotFoundError(f"no such dataset: {path} (a folder of .tar shards, one .tar, a range or glob of them)")
    return shards


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
        description = files.read_json(path / DATASET_FILE)
        if description["version"] != DATASET_VERSION:
            raise ShardError(f"{path / DATASET_FILE} has version {description['version']}, not {DATASET_VERSION}")
        names, expected_hash = [shard["name"] for shard in description["shards"]], description["hash"]
        sizes = [shard["bytes"] for shard in description["shards"]]
        require_plain_names(names)
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


def require_plain_names(names: Iterable[object]) -> None:
    """Raise ValueError for names that are none of files in the dataset's own folder."""
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
            raise ValueError(f"{name!r} is no name of a shard in its folder")
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise ValueError(f"the name {name[:40]}... is too long")


def _explain(path: Path | str, reasons: Mapping[str, int]) -> str:
    """What was found instead of samples, and what to do about it."""
    if isinstance(path, Path) and path.is_file() and (kind := _find_kind(path)):
        return kind
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    if reasons.get("no_caption") and reasons.get("duplicate_key"):
        hint = "; the files of a sample must be neighbours in the tar: write it with `tar --sort=name`"
    elif set(reasons) == {"no_image"}:
        hint = "; the suffix of a file is all behind the first dot of its name, so `2.0 (a).jpg` is no .jpg"
    elif set(reasons) == {"no_caption"}:
        hint = "; a caption is key.txt beside key.jpg, or `caption` in key.json, or what --caption-key names there"
    else:
        hint = ""
    return f"{counts or 'nothing found'}{hint}"


def _find_kind(path: Path) -> str | None:
    """What a file that is no tar is, as a hint."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; decompress it with gunzip"
    if head.startswith((b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "it is compressed; decompress it"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, which a download gave in place of the file"
    if head.startswith(b"PAR1") or path.suffix.lower() in (".csv", ".tsv", ".parquet", ".jsonl", ".json"):
        return "it is a table; datasets are .tar shards with key.jpg and key.txt, as diptych.write_shards writes them"
    return None


def _name_others(path: Path) -> str:
    """What a folder holds in place of tars."""
    below = sorted({tar.parent.relative_to(path).as_posix() for tar in path.glob("*/*.tar")})
    if below:
        return f"; there are some in {', '.join(below[:3])}: name that folder"
    suffixes = Counter("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in path.iterdir())
    found = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in suffixes.most_common(5))
    gz = "; decompress them with gunzip" if ".tar.gz" in suffixes or ".tgz" in suffixes else ""
    return f" (other files: {found}){gz}" if found else ""
