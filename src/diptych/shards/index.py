"""The index of a shard: which samples it holds, where their pictures lie, and what was wrong with the rest.

A shard is a plain WebDataset tar, `key.jpg key.txt key.json` side by side. Our own writer puts the index beside it
(`00000.arrow`); for a foreign tar it is built on first use and kept in a cache, since other people's folders are not
ours to write to.

An index is believed as far as it can be checked: its checksum, that every picture lies inside the tar and, if the tar
was touched after its index, that names and texts are those of the tar. Pictures are checked when they are read.
"""

import contextlib
import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from diptych import files
from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, MAX_BYTES
from diptych.machine import read_at
from diptych.shards.members import Damage, Member, iter_members

INDEX_VERSION = 2
READ_VERSIONS = (1, INDEX_VERSION)
"""Version 1 has no checksum."""
SCAN_VERSION = 5
"""Version of the rules by which a foreign tar is read: a cached index by other rules is rebuilt."""
MAX_TEXT_BYTES = 1 << 20
"""Bytes of a caption, or of a sample's JSON."""
MAX_INDEX_BYTES = 1 << 30
"""Bytes of an index, which is held in memory."""
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
    several: bool = False
    """Whether every line of a caption is a caption of its own."""

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def content_hash(self) -> str:
        """Hash of what training sees of the index; the same wherever the shard lies."""
        digest = xxhash.xxh3_128(b"several" if self.several else b"")
        for column in ("key", "caption", "offset", "size", "xxh3"):
            digest.update(json.dumps(self.table.column(column).to_pylist(), ensure_ascii=False).encode())
        return digest.hexdigest()

    @property
    def checksum(self) -> str:
        """Hash of all that the index says."""
        return files.digest(json.dumps([self.content_hash, self.table.column("details").to_pylist(), self.skipped]))

    def choose_captions(self, name: str) -> "ShardIndex":
        """The samples that have a caption, or a list of several, under a name of their JSON; the others are skipped."""
        found = [_captions_of(details, name) for details in self.table["details"].to_pylist()]
        usable = pa.array([captions is not None for captions in found], pa.bool_())
        lost = [
            (key, "no_caption") for key, one in zip(self.table["key"].to_pylist(), found, strict=True) if one is None
        ]
        captions = pa.array([captions for captions in found if captions is not None], pa.string())
        place = INDEX_SCHEMA.get_field_index("caption")
        table = self.table.filter(usable).set_column(place, INDEX_SCHEMA.field(place), captions)
        return ShardIndex(self.path, table, (*self.skipped, *lost), several=True)


def _captions_of(details: str, name: str) -> str | None:
    """Captions under a name of a sample's JSON, one a line; None if there is none that can be used."""
    try:
        found = files.parse_json(details).get(name)
        texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
        lines = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
        return "\n".join(lines).encode().decode() or None  # JSON can hold half a surrogate pair, a caption cannot
    except (ValueError, AttributeError):
        return None


def load_index(shard: Path, *, captionless: bool = False) -> ShardIndex:
    """Open the index of a shard: the one beside it, the cached one, or a new one, `captionless` as in `build_index`."""
    if not shard.is_file():
        raise NotFoundError(f"no such shard: {shard}")
    beside = shard.with_suffix(".arrow")
    if beside.exists():
        index = read_index(shard, beside, shard.stat().st_size)
        _require_same(index, beside)
        return index
    with contextlib.suppress(OSError, ShardError):  # there is none, it is damaged, or there is no cache
        return read_index(shard, _cache_path(shard, captionless), shard.stat().st_size)
    index = build_index(shard, captionless=captionless)
    try:
        cached = _cache_path(shard, captionless)
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_index(index, cached)
    except OSError as error:
        warnings.warn(
            f"indexes of shards cannot be kept ({error.strerror or error}), so they are made anew at every start; "
            "set DIPTYCH_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return index


def read_index(shard: Path, path: Path, tar_bytes: int | None = None) -> ShardIndex:
    """Read an index file; ShardError if it is damaged or not one of ours, OSError if it cannot be read.

    With `tar_bytes`, the size of the shard, every picture must lie inside of it.
    """
    try:
        data = files.read_bytes(path, MAX_INDEX_BYTES)
    except UsageError as error:
        raise ShardError(f"{error}; delete it and it is built anew") from None
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        metadata = table.schema.metadata or {}
        version = int(metadata.get(b"version", 0))
        if table.schema.remove_metadata() != INDEX_SCHEMA or version not in READ_VERSIONS:
            raise ShardError(f"{path} is an index of another version; delete it and it is built anew")
        table.validate(full=True)  # else a damaged offset of a text is followed to wherever it points
        skipped = tuple((str(key), str(reason)) for key, reason in files.parse_json(metadata[b"skipped"]))
        index = ShardIndex(shard, table, skipped)
        if version > 1 and metadata[b"checksum"].decode() != index.checksum:
            raise ValueError("its checksum is another")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a shard index ({error}); delete it and it is built anew") from None
    offsets, sizes = (table.column(name).to_numpy() for name in ("offset", "size"))
    end = np.iinfo(np.int64).max if tar_bytes is None else tar_bytes
    if (offsets < 0).any() or (sizes < 0).any() or (sizes > end - offsets).any():
        raise ShardError(f"{shard} is shorter than its index {path.name} says; copy the shard again")
    return index


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index as an Arrow file."""
    metadata = {"version": str(INDEX_VERSION), "skipped": json.dumps(index.skipped), "checksum": index.checksum}
    sink = pa.BufferOutputStream()
    table = index.table.replace_schema_metadata(metadata)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files.write_bytes(path, sink.getvalue().to_pybytes())


def build_index(shard: Path, *, captionless: bool = False) -> ShardIndex:
    """Scan a tar of any origin. Samples are runs of neighbouring members with the same key (the WebDataset rule).

    With `captionless` a picture needs no caption: labels, or captions under another name, may be in its JSON.
    """
    with open(shard, "rb") as tar:
        rows, skipped = _scan(tar, shard, captionless)
        for row in rows:
            row["xxh3"] = xxhash.xxh3_64_intdigest(read_at(tar.fileno(), row["size"], row["offset"]))
    return ShardIndex(shard, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), tuple(skipped))


def _require_same(index: ShardIndex, beside: Path) -> None:
    """Compare names and texts with the tar itself, if that was touched after its index was written.

    Copying a folder may touch the tar last, so that two that belong together are noted and not compared again.
    """
    shard = index.path
    touched = shard.stat()
    if max(touched.st_mtime_ns, touched.st_ctime_ns) <= beside.stat().st_ctime_ns:
        return
    note = None
    with contextlib.suppress(OSError):
        note = files.cache_folder("compared") / f"{_name(shard)}-{index.checksum}"
        if note.exists():
            return
    with open(shard, "rb") as tar:
        rows, _ = _scan(tar, shard)
    said = index.table.to_pylist()
    columns = ("key", "offset", "size", "details")
    texts = [[row["caption"].removeprefix("\ufeff") for row in table] for table in (rows, said)]
    if texts[0] != texts[1] or any([r[name] for r in rows] != [r[name] for r in said] for name in columns):
        raise ShardError(
            f"{shard} is not the tar that its index {beside.name} was made of; copy both again, or delete the index, "
            "and it is built anew"
        )
    if note is not None:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def _scan(tar: BinaryIO, shard: Path, captionless: bool = False) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Rows of the index, without the hashes of pictures, and (key, reason) of what is no sample."""
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    seen: set[str] = set()
    damaged: set[str] = set()

    def finish(key: str, members: dict[str, Member]) -> None:
        if not members or key in damaged:  # a sample that lost a part is not used
            return
        if key in seen:
            skipped.append((key, "duplicate_key"))
            return
        seen.add(key)
        row = _read_sample(tar, key, members, captionless)
        if isinstance(row, str):
            skipped.append((key, row))
        else:
            rows.append(row)

    key, members = "", dict[str, Member]()
    for item in iter_members(shard):
        stem, suffix = split_name(item.name)
        if isinstance(item, Damage):
            skipped.append((stem or f"@{item.offset}", item.reason))
            if item.name:
                damaged.add(stem)
            continue
        if is_metadata_of_macos(item.name):
            continue
        if stem != key or suffix in members:
            finish(key, members)
            key, members = stem, {}
        members[suffix] = item
    finish(key, members)
    return rows, skipped


def _read_sample(tar: BinaryIO, key: str, members: dict[str, Member], captionless: bool) -> dict[str, Any] | str:
    """Build the index row of one sample, or say why there is none."""
    image = next((member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
    if image is None:
        return "no_image"
    if image.size == 0:
        return "empty_image"
    if image.size > MAX_BYTES:
        return "too_many_bytes"
    if any(name in members and members[name].size > MAX_TEXT_BYTES for name in ("txt", "json")):
        return "text_too_large"
    caption = _read(tar, members.get("txt"))
    try:
        details = (_read(tar, members.get("json")) or b"").decode("utf-8-sig")
        parsed = files.parse_json(details) if details else {}
        text = caption.decode("utf-8-sig") if caption is not None else parsed.get("caption")
        (text if isinstance(text, str) else "").encode()  # JSON can hold half a surrogate pair, a caption cannot
    except (ValueError, AttributeError):
        return "bad_text"
    if not isinstance(parsed, dict):
        return "bad_text"
    if captionless and not isinstance(text, str):
        text = ""
    if text is None:
        return "no_caption"
    if not isinstance(text, str) or not (text.strip() or captionless):
        return "empty_caption"
    return {
        "key": key,
        "caption": text.strip(),
        "offset": image.offset,
        "size": image.size,
        "details": details or "{}",
    }


def _read(tar: BinaryIO, member: Member | None) -> bytes | None:
    return None if member is None else read_at(tar.fileno(), member.size, member.offset)


def split_name(name: str) -> tuple[str, str]:
    """`folder/cat.0.jpg` -> (`folder/cat`, `0.jpg`): the key ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def is_metadata_of_macos(name: str) -> bool:
    """Whether a member or file is what macOS puts beside a file when it copies it: `._cat.jpg`, `__MACOSX/`."""
    folder, _, file = name.rpartition("/")
    return file.startswith("._") or "__MACOSX" in folder.split("/")


def _cache_path(shard: Path, captionless: bool) -> Path:
    return files.cache_folder("index") / f"{_name(shard)}{'-captionless' if captionless else ''}.arrow"


def _name(shard: Path) -> str:
    """Name of one state of a file by one set of rules."""
    status = shard.stat()
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    identity = f"{INDEX_VERSION}.{SCAN_VERSION} {shard.resolve()} {state}"
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]
