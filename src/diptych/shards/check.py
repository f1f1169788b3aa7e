"""What a dataset holds: every member read and every picture decoded; some samples for people to look at."""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image

from diptych import files
from diptych.decode import decode
from diptych.errors import PictureError
from diptych.shards.dataset import Dataset
from diptych.shards.index import ShardIndex
from diptych.shards.members import Member, iter_members
from diptych.shards.tombstones import DELETED

THUMBNAIL = 192
"""Pixels of the longer side of a picture on a sheet."""
_TOGETHER = 64
"""Pictures that are decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was read: `samples` is `usable` and all of `reasons`."""

    shards: int
    members: int
    """Files in the tars."""
    bytes: int
    """Bytes of those files."""
    samples: int
    usable: int
    reasons: dict[str, int]
    """Reason -> samples, or stretches of a tar, that cannot be used."""
    broken: tuple[tuple[str, str, str], ...]
    """(shard, key, reason) of each of them."""


class Shown(NamedTuple):
    """A sample, for people."""

    shard: str
    key: str
    captions: tuple[str, ...]
    image: bytes
    size: tuple[int, int] | None
    """Width and height; None if it cannot be decoded."""
    reason: str


def check(dataset: Dataset, threads: int | None = None) -> CheckReport:
    """Read every member of every shard and decode every picture."""
    broken: list[tuple[str, str, str]] = []
    members = size = samples = 0
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for shard in dataset.shards:
            found = [item for item in iter_members(shard.path) if isinstance(item, Member)]
            members, size = members + len(found), size + sum(item.size for item in found)
            samples += len(shard) + len(shard.skipped)
            broken += [(shard.path.name, key, reason) for key, reason in shard.skipped]
            for some in _in_blocks(shard, dataset.deleted):
                for one in pool.map(_judge, some):
                    if one.reason:
                        broken.append((one.shard, one.key, one.reason))
    reasons = Counter(reason for _, _, reason in broken)
    return CheckReport(
        shards=len(dataset.shards),
        members=members,
        bytes=size,
        samples=samples,
        usable=samples - len(broken),
        reasons=dict(sorted(reasons.items())),
        broken=tuple(broken),
    )


class _Stored(NamedTuple):
    shard: str
    key: str
    captions: tuple[str, ...]
    image: bytes
    xxh3: int
    deleted: bool


def _in_blocks(
    shard: ShardIndex, deleted: frozenset[str], rows: Sequence[int] | None = None
) -> Iterator[list[_Stored]]:
    """Samples of a shard with their bytes, some at a time."""
    table = shard.table if rows is None else shard.table.take(list(rows))
    with open(shard.path, "rb") as tar:
        for batch in table.to_batches(_TOGETHER):
            yield [
                _Stored(
                    shard.path.name,
                    row["key"],
                    _captions_of(row["caption"], row["details"]),
                    os.pread(tar.fileno(), row["size"], row["offset"]),
                    row["xxh3"],
                    row["key"] in deleted,
                )
                for row in batch.to_pylist()
            ]


def _captions_of(caption: str, details: str) -> tuple[str, ...]:
    several = files.parse_json(details).get("captions")
    texts = [one for one in several if isinstance(one, str)] if isinstance(several, list) else []
    return tuple(dict.fromkeys([caption, *texts]))


def _judge(stored: _Stored) -> Shown:
    reason, size = "", None
    try:
        if xxhash.xxh3_64_intdigest(stored.image) != stored.xxh3:
            raise PictureError("changed", stored.key)
        size = decode(stored.image).size
    except PictureError as error:
        reason = error.reason
    return Shown(*stored[:4], size, DELETED if stored.deleted else reason)


def pick(dataset: Dataset, count: int, *, spread: bool = False) -> Iterator[Shown]:
    """The first samples, or as many at even distances over the whole dataset."""
    total = len(dataset)
    count = min(count, total)
    chosen = (np.arange(count) * total // max(count, 1)) if spread else np.arange(count)
    first = 0
    for shard in dataset.shards:
        rows = chosen[(chosen >= first) & (chosen < first + len(shard))] - first
        first += len(shard)
        for some in _in_blocks(shard, dataset.deleted, rows.tolist()) if len(rows) else ():
            yield from map(_judge, some)


def write_sheet(dataset: Dataset, path: Path, count: int) -> int:
    """Write a contact sheet as one HTML file; how many samples are on it."""
    cells = [_draw_cell(shown) for shown in pick(dataset, count, spread=True) if shown.reason != DELETED]
    title = html.escape(f"{dataset.path}: {len(cells):,} of {len(dataset):,} samples")
    page = _PAGE.format(title=title, size=THUMBNAIL, cells="\n".join(cells))
    files.write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return len(cells)


def _draw_cell(shown: Shown) -> str:
    texts = "".join(f"<p>{html.escape(text)}</p>" for text in shown.captions)
    name = html.escape(shown.key)
    if shown.reason or shown.size is None:
        return f"<figure><div>{html.escape(shown.reason)}</div>{texts}<figcaption>{name}</figcaption></figure>"
    image = decode(shown.image, side=THUMBNAIL).convert("RGBA")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small = Image.new("RGB", image.size, "white")
    small.paste(image, mask=image)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = shown.size
    about = f"{name} &middot; {width} x {height} &middot; {len(shown.image):,} bytes"
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{texts}<figcaption>{about}</figcaption></figure>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({size}px, 1fr)); gap: 1.5em; }}
figure {{ margin: 0; overflow-wrap: anywhere; }} p {{ margin: .3em 0; }} figcaption {{ color: #777; font-size: 12px; }}
figure div {{ background: #fdd; padding: 4em .5em; text-align: center; }}
</style></head><body><h1>{title}</h1><main>
{cells}
</main></body></html>
"""
