"""Takes deleted samples out of shards for good.

A shard that is concerned is written anew under a new name (00003.tar -> 00003-1.tar), then dataset.json is replaced,
then the old shard goes. Whenever this stops, the folder holds a whole dataset: the old one or the new one. The
tombstones stay, so that the same samples do not come back with a later delivery.
"""

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from diptych import files
from diptych.errors import UsageError
from diptych.machine import read_at
from diptych.shards.dataset import DATASET_FILE, Dataset, describe, load_dataset
from diptych.shards.index import ShardIndex, build_index, load_index, split_name, write_index
from diptych.shards.members import Member, iter_members

_NAME = re.compile(r"(.+?)(?:-(\d+))?\.tar")


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What `compact` did."""

    samples: int
    """Taken out."""
    shards: int
    """Written anew, or gone since nothing was left in them."""
    freed: int
    """Bytes."""
    dataset_hash: str
    """Hash of the dataset that is left."""


def compact(folder: Path) -> CompactReport:
    """Write shards that hold deleted samples anew; raises UsageError if the folder is not a dataset of our own."""
    if not (folder / DATASET_FILE).exists():
        raise UsageError(f"{folder} has no {DATASET_FILE}: shards of other origin are not changed, only left out of")
    files.remove_leftovers(folder)
    before = load_dataset(folder)
    indexes: list[ShardIndex] = []
    old: list[Path] = []
    samples = 0
    for shard in before.shards:
        gone = before.deleted.intersection(shard.table["key"].to_pylist())
        if not gone:
            indexes.append(shard)
            continue
        samples += len(gone)
        old.append(shard.path)
        rest = _rewrite(shard.path, gone)
        if rest is not None:
            indexes.append(rest)
    sizes = sum(path.stat().st_size for path in old)
    after = Dataset.from_indexes(folder, indexes, before.deleted)
    files.write_json(folder / DATASET_FILE, describe(after))
    _remove_unlisted(folder, after)
    new = {shard.path for shard in after.shards} - {shard.path for shard in before.shards}
    freed = sizes - sum(path.stat().st_size for path in new)
    return CompactReport(samples=samples, shards=len(old), freed=freed, dataset_hash=after.content_hash)


def _rewrite(shard: Path, gone: frozenset[str]) -> ShardIndex | None:
    """Copy what stays, byte for byte, into the next generation of a shard; None if nothing does."""
    members = [one for one in iter_members(shard) if isinstance(one, Member)]
    members = [one for one in members if split_name(one.name)[0] not in gone]
    if not members:
        return None
    buffer = io.BytesIO()
    with open(shard, "rb") as source, tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            tar.addfile(info, io.BytesIO(read_at(source.fileno(), member.size, member.offset)))
    path = shard.with_name(next_name(shard.name))
    files.write_bytes(path, buffer.getvalue())
    index = build_index(path)
    write_index(index, path.with_suffix(".arrow"))
    return load_index(path) if len(index) else None


def next_name(name: str) -> str:
    """00003.tar -> 00003-1.tar -> 00003-2.tar."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return f"{match[1]}-{int(match[2] or 0) + 1}.tar"


def _remove_unlisted(folder: Path, dataset: Dataset) -> None:
    """Delete shards that the dataset does not list: old generations, also those a killed run left."""
    listed = {shard.path.stem for shard in dataset.shards}
    for path in [*folder.glob("*.tar"), *folder.glob("*.arrow")]:
        if path.stem not in listed:
            path.unlink()
