"""Pairs to shards: plain tars that WebDataset and OpenCLIP read too, an Arrow index beside each, one dataset.json."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych import files
from diptych.errors import UsageError
from diptych.image_file import SUFFIXES, find_format
from diptych.pair import Pair, format_details
from diptych.shards.dataset import DATASET_FILE, Dataset, describe
from diptych.shards.index import MAX_TEXT_BYTES, ShardIndex, build_index, load_index, write_index


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What `write_shards` did."""

    samples: int
    shards: int
    dropped: dict[str, int]
    """Reason -> how many pairs were not written."""
    dataset_hash: str


def write_shards(pairs: Iterable[Pair], folder: Path | str, *, samples_per_shard: int = 1000) -> WriteReport:
    """Write pairs into `folder` as 00000.tar, 00001.tar, ... in the order they come.

    The same pairs give the same bytes. A folder that already holds a dataset is refused. Pairs that cannot be written
    are dropped and counted: `bad_key` (empty, or with a dot, slash, backslash or NUL), `duplicate_key`, `bad_text` (no
    valid Unicode), `bad_details` (no JSON), `text_too_large`, `empty_image`, `not_a_picture`, `empty_caption`.
    """
    folder = Path(folder)
    if (folder / DATASET_FILE).exists():
        raise UsageError(f"{folder} already holds a dataset; name another folder or delete it")
    files.make_folder(folder, flag="folder")
    files.remove_leftovers(folder)
    dropped = Counter[str]()
    keys: set[str] = set()

    def choose() -> Iterator[Pair]:
        for pair in pairs:
            if reason := why_not(pair, keys):
                dropped[reason] += 1
            else:
                keys.add(pair.key)
                yield pair

    indexes = list(
        iter_shards(choose(), (folder / shard_name(number) for number in itertools.count()), samples_per_shard)
    )
    if not indexes:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        raise UsageError(f"no pair was left to write into {folder}; dropped: {counts or 'none came'}")
    dataset = Dataset.from_indexes(folder, indexes)
    files.write_json(folder / DATASET_FILE, describe(dataset))
    hash, shards = dataset.content_hash, len(indexes)
    return WriteReport(samples=len(dataset), shards=shards, dropped=dict(dropped), dataset_hash=hash)


def iter_shards(pairs: Iterable[Pair], paths: Iterable[Path], samples_per_shard: int) -> Iterator[ShardIndex]:
    """Write pairs that `why_not` has nothing against, a shard at each of `paths` until none is left. One picture at a
    time is in memory."""
    waiting = iter(pairs)
    for path, first in zip(paths, waiting, strict=False):
        yield write_shard(itertools.chain([first], itertools.islice(waiting, samples_per_shard - 1)), path)


def write_description(folder: Path, shards: Iterable[Path]) -> Dataset:
    """Write dataset.json for shards that are there with their indexes."""
    dataset = Dataset.from_indexes(folder, [load_index(shard) for shard in shards])
    files.write_json(folder / DATASET_FILE, describe(dataset))
    return dataset


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:05d}.tar"


def why_not(pair: Pair, keys: Container[str]) -> str:
    """The reason not to write a pair, or nothing; `keys` are those that are taken."""
    if not pair.key or any(character in pair.key for character in "./\\\0"):
        return "bad_key"
    if pair.key in keys:
        return "duplicate_key"
    try:
        details = _details_of(pair)
    except (TypeError, ValueError, RecursionError):
        return "bad_details"
    if not all(map(is_unicode, (pair.key, pair.caption, details))):
        return "bad_text"
    if max(len(text.encode()) for text in (pair.caption, details)) > MAX_TEXT_BYTES:
        return "text_too_large"
    if not pair.image:
        return "empty_image"
    if not _suffix(pair.image):
        return "not_a_picture"
    return "" if pair.caption.strip() else "empty_caption"


def write_shard(pairs: Iterable[Pair], path: Path) -> ShardIndex:
    """Write one tar and the index beside it; the pairs are such that `why_not` has nothing against."""
    with (
        files.atomic_file(path) as temporary,
        tarfile.open(temporary, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for pair in pairs:
            details = _details_of(pair)
            for ending, content in (
                (_suffix(pair.image or b""), pair.image or b""),
                ("txt", pair.caption.encode()),
                ("json", details.encode()),
            ):
                info = tarfile.TarInfo(f"{pair.key}.{ending}")  # no time, no owner: bytes depend on pairs alone
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index = build_index(path)
    write_index(index, path.with_suffix(".arrow"))
    return index


def _details_of(pair: Pair) -> str:
    """The sample's JSON; its caption is that of the pair, whatever was noted before."""
    return format_details({"caption": "", **pair.details} | {"caption": pair.caption})


def is_unicode(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(image: bytes) -> str:
    kind = find_format(image)
    return SUFFIXES[kind][0].removeprefix(".") if kind else ""
