"""The index of a shard: which samples it holds, where their pictures lie, and what was wrong with the rest.

A shard is a plain WebDataset tar, `key.jpg key.txt key.json` side by side. Our own writer puts the index beside it
(`00000.arrow`); for a foreign tar it is built on first use and kept in a cache, since other people's folders are not
ours to write to.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from diptych import files
from diptych.errors import NotFoundError, ShardError
from diptych.image_file import IMAGE_SUFFIXES
from diptych.shards.members import Damage, Member, iter_members

INDEX_VERSION = 1
SCAN_VERSION = 3
"""Version of the rules by which a foreign tar is read: a cached index by other rules is rebuilt."""
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("xxh3", pa.uint64(), nullable=False),
        pa.field("details", pa.string(), nullable=False),
    ]
)
"""One row a sample: picture at [offset, offset + size) of the tar, its XXH3-64, the sample's JSON as text."""


@dataclass(frozen=True)
class ShardIndex:
    """A shard and the table of its samples."""

    path: Path
    table: pa.Table
    skipped: tuple[tuple[str, str], ...]
    """(key, reason) of each sample that cannot be used."""

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def skipped_counts(self) -> dict[str, int]:
        """Reason -> how many."""
        return dict(sorted(Counter(reason for _, reason in self.skipped).items()))

    @property
    def content_hash(self) -> str:
        """Hash of everything the index says; the same wherever the shard lies."""
        digest = xxhash.xxh3_128()
        for column in ("key", "caption", "offset", "size", "xxh3"):
            digest.update(json.dumps(self.table.column(column).to_pylist(), ensure_ascii=False).encode())
        return digest.hexdigest()


def load_index(shard: Path) -> ShardIndex:
    """Open the index of a shard: the one beside it, the cached one, or a new one."""
    if not shard.is_file():
        raise NotFoundError(f"no such shard: {shard}")
    beside = shard.with_suffix(".arrow")
    if beside.exists():
        index = read_index(shard, beside)
        ends = max((o + s for o, s in zip(*_columns(index.table, "offset", "size"), strict=True)), default=0)
        if ends > shard.stat().st_size:
            raise ShardError(f"{shard} is shorter than its index {beside.name} says; copy the shard again")
        return index
    cached = _cache_path(shard)
    if cached.exists():
        return read_index(shard, cached)
    index = build_index(shard)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_index(index, cached)
    return index


def read_index(shard: Path, path: Path) -> ShardIndex:
    """Read an index file; raises ShardError if it is not one of ours."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardError(f"{path} is not a shard index ({error}); delete it and it is built anew") from None
    metadata = table.schema.metadata or {}
    if table.schema.remove_metadata() != INDEX_SCHEMA or metadata.get(b"version") != b"%d" % INDEX_VERSION:
        raise ShardError(f"{path} is an index of another version; delete it and it is built anew")
    skipped = tuple((key, reason) for key, reason in json.loads(metadata[b"skipped"]))
    return ShardIndex(shard, table, skipped)


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index as an Arrow file."""
    metadata = {"version": str(INDEX_VERSION), "skipped": json.dumps(index.skipped)}
    sink = pa.BufferOutputStream()
    table = index.table.replace_schema_metadata(metadata)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write_bytes(path, sink.getvalue().to_pybytes())


def build_index(shard: Path) -> ShardIndex:
    """Scan a tar of any origin. Samples are runs of neighbouring members with the same key (the WebDataset rule)."""
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()

    def finish(key: str, members: dict[str, Member]) -> None:
        if not members:
            return
        if key in seen:
            skipped.append((key, "duplicate_key"))
            return
        seen.add(key)
        row = _read_sample(tar, key, members)
        if isinstance(row, str):
            skipped.append((key, row))
        else:
            rows.append(row)

    with open(shard, "rb") as tar:
        key, members = "", dict[str, Member]()
        for item in iter_members(shard):
            if isinstance(item, Damage):
                stem, _ = split_name(item.name)
                skipped.append((stem or f"@{item.offset}", item.reason))
                if item.name and stem == key:
                    members = {}  # a sample that lost a part is not used
                continue
            stem, suffix = split_name(item.name)
            if stem != key or suffix in members:
                finish(key, members)
                key, members = stem, {}
            members[suffix] = item
        finish(key, members)
    return ShardIndex(shard, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), tuple(skipped))


def _read_sample(tar: Any, key: str, members: dict[str, Member]) -> dict[str, Any] | str:
    """Build the index row of one sample, or say why there is none."""
    image = next((member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
    if image is None:
        return "no_image"
    if image.size == 0:
        return "empty_image"
    details = _read(tar, members.get("json"))
    caption = _read(tar, members.get("txt"))
    try:
        parsed = json.loads(details) if details else {}
        text = caption.decode() if caption is not None else parsed.get("caption")
        (text if isinstance(text, str) else "").encode()  # JSON can hold half a surrogate pair, a caption cannot
    except (ValueError, AttributeError, RecursionError):
        return "bad_text"
    if not isinstance(parsed, dict):
        return "bad_text"
    if text is None:
        return "no_caption"
    if not isinstance(text, str) or not text.strip():
        return "empty_caption"
    return {
        "key": key,
        "caption": text.strip(),
        "offset": image.offset,
        "size": image.size,
        "xxh3": xxhash.xxh3_64_intdigest(_read(tar, image) or b""),
        "details": details.decode("utf-8", "replace") if details else "{}",
    }


def _read(tar: Any, member: Member | None) -> bytes | None:
    return None if member is None else os.pread(tar.fileno(), member.size, member.offset)


def split_name(name: str) -> tuple[str, str]:
    """`folder/cat.0.jpg` -> (`folder/cat`, `0.jpg`): the key ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in names]


def _cache_path(shard: Path) -> Path:
    status = shard.stat()
    identity = f"{INDEX_VERSION}.{SCAN_VERSION} {shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    return files.cache_folder("index") / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.arrow"
