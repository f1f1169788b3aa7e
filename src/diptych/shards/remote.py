"""A dataset at any fsspec URL: which shards it has, and the index of each.

    s3://bucket/shards                       a folder with dataset.json, or any folder of tars that can be listed
    https://host/shards/00000.tar            one tar
    https://host/shards/{00000..00099}.tar   a range of them

Indexes are kept here for good. A tar without one is fetched and indexed when it is first named, which can take long.
"""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from diptych import files
from diptych.errors import NotFoundError, ShardError, UsageError, install
from diptych.shards.cache import RemoteShard, ShardCache, with_retries
from diptych.shards.dataset import DATASET_FILE, DATASET_VERSION, Dataset, require_plain_names
from diptych.shards.index import MAX_INDEX_BYTES, ShardIndex, build_index, read_index, write_index
from diptych.shards.order import BLOCK_SHARDS
from diptych.shards.tombstones import TOMBSTONES_FILE, parse_tombstones

LOG = logging.getLogger(__name__)

_THREADS = 8
_ask = partial(with_retries, opening=True)


@dataclass(frozen=True)
class RemoteDataset:
    """What is known of a dataset without its pictures being here."""

    dataset: Dataset
    shards: tuple[RemoteShard, ...]

    @property
    def block_bytes(self) -> int:
        """Most bytes that one block of shards can take."""
        return sum(sorted((shard.size or 0 for shard in self.shards), reverse=True)[:BLOCK_SHARDS])


def open_remote(url: str, cache: ShardCache, caption_key: str | None = None) -> RemoteDataset:
    """Find the shards at a URL and their indexes; `caption_key` as in `load_dataset`."""
    store, root = _connect(url)
    names = files.expand_range(url)
    if len(names) > 1 or url.endswith(".tar"):
        return _open_foreign(store, url, names, cache, caption_key)
    name = f"{url}/{DATASET_FILE}"
    description = _require_end(_ask(name, lambda: _read_optional(store, f"{root}/{DATASET_FILE}")), name)
    if description is not None:
        found = _open_described(store, root, url, description, cache)
        return replace(found, dataset=found.dataset.choose_captions(caption_key)) if caption_key else found
    listed = _ask(url, lambda: store.ls(root, detail=False))
    tars = sorted({str(place).rstrip("/").rpartition("/")[2] for place in listed})
    tars = [name for name in tars if name.endswith(".tar")]
    if not tars:
        raise NotFoundError(
            f"neither {DATASET_FILE} nor .tar shards at {url}; a range is named {url}/{{00000..00099}}.tar"
        )
    return _open_foreign(store, url, [f"{url}/{name}" for name in tars], cache, caption_key)


def require_room(sources: list[RemoteDataset], cache: ShardCache) -> None:
    """A block of every source must fit, since its samples are mixed."""
    needed = sum(source.block_bytes for source in sources)
    if needed > cache.limit:
        raise UsageError(
            f"cache_bytes {cache.limit} cannot hold one block of {BLOCK_SHARDS} shards of each source, which takes up "
            f"to {needed} bytes; use --cache-bytes {2 * needed} (two blocks, so that the next one is fetched ahead)"
        )


def _connect(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            # fsspec would end any download after five minutes; what must not happen is that nothing comes
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        store, root = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UsageError(f"data at {url} cannot be used: {error}; {install('remote')} for http") from None
    return store, str(root).rstrip("/")


def _open_described(store: Any, root: str, url: str, text: bytes, cache: ShardCache) -> RemoteDataset:
    try:
        description = files.parse_json(text)
        if description["version"] != DATASET_VERSION:
            raise ShardError(f"{url}/{DATASET_FILE} has version {description['version']}, not {DATASET_VERSION}")
        entries = [(str(shard["name"]), int(shard["bytes"])) for shard in description["shards"]]
        expected = str(description["hash"])
        require_plain_names(name for name, _ in entries)
        if any(size < 0 or not name.endswith(".tar") for name, size in entries):
            raise ValueError("it lists what cannot be a shard")
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{url}/{DATASET_FILE} is damaged ({error!r}); write the dataset again") from None
    folder = _folder(cache, url, expected)
    shards = tuple(RemoteShard(store, f"{root}/{name}", f"{url}/{name}", size, folder / name) for name, size in entries)
    dataset = Dataset.from_indexes(url, _indexes(shards, cache), _deleted(store, root, url))
    if dataset.content_hash != expected:
        for shard in shards:
            shard.local.with_suffix(".arrow").unlink(missing_ok=True)
        raise ShardError(
            f"the indexes at {url} are not those that {DATASET_FILE} describes; copy the folder there again"
        )
    return RemoteDataset(dataset, shards)


def _open_foreign(store: Any, url: str, urls: list[str], cache: ShardCache, caption_key: str | None) -> RemoteDataset:
    def look(one: str) -> RemoteShard:
        _, place = fsspec.core.url_to_fs(one)
        info = _ask(one, lambda: store.info(place))
        size = info.get("size")
        mark = [str(info.get(name)) for name in ("ETag", "etag", "mtime", "LastModified", "created")]
        name = one.rpartition("/")[2]
        return RemoteShard(store, place, one, size, _folder(cache, one, size, *mark) / name)

    with ThreadPoolExecutor(_THREADS) as pool:
        shards = tuple(pool.map(look, urls))
    folders = {(shard.place.rpartition("/")[0], shard.url.rpartition("/")[0]) for shard in shards}
    deleted = frozenset[str]().union(*(_deleted(store, place, folder) for place, folder in sorted(folders)))
    indexes = _indexes(shards, cache, captionless=caption_key is not None)
    if caption_key is not None:
        indexes = [index.choose_captions(caption_key) for index in indexes]
    return RemoteDataset(Dataset.from_indexes(url, indexes, deleted), shards)


def _indexes(shards: tuple[RemoteShard, ...], cache: ShardCache, *, captionless: bool = False) -> list[ShardIndex]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda shard: _index(shard, cache, captionless), shards))


def _index(shard: RemoteShard, cache: ShardCache, captionless: bool) -> ShardIndex:
    """The index that is here, the one beside the shard, or one made of the shard."""
    here = shard.local.with_suffix(".captionless.arrow" if captionless else ".arrow")
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        beside = shard.place.removesuffix(".tar") + ".arrow"
        data = _ask(beside, lambda: _read_optional(shard.files, beside, MAX_INDEX_BYTES))
        if (found := _require_end(data, beside, MAX_INDEX_BYTES)) is not None:
            files.write_bytes(here, found)
        else:
            _make_index(shard, here, cache, captionless)
    try:
        return read_index(shard.local, here, shard.size)
    except ShardError:
        here.unlink()  # the next start asks again
        raise


def _make_index(shard: RemoteShard, here: Path, cache: ShardCache, captionless: bool) -> None:
    descriptor = cache.open(shard, None)
    try:
        write_index(build_index(shard.local, captionless=captionless), here)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _deleted(store: Any, root: str, url: str) -> frozenset[str]:
    """What was deleted from a folder; asked for at every start, never cached."""
    name = f"{url}/{TOMBSTONES_FILE}"

    def read() -> bytes | None:
        try:
            return _read_optional(store, f"{root}/{TOMBSTONES_FILE}")
        except Exception as error:  # every file system raises its own
            if not isinstance(error, PermissionError) and not str(error).startswith("403"):
                raise
            LOG.warning("%s is forbidden (%s): taken as if there were none, as some stores say so then", name, error)
            return None

    text = _require_end(_ask(name, read), name)
    return frozenset() if text is None else parse_tombstones(text, name)


def _read_optional(store: Any, place: str, limit: int = files.MAX_JSON) -> bytes | None:
    """Up to `limit` bytes of a file and one more, or None where there is none."""
    streamed = {"block_size": 0} if "http" in store.protocol else {}  # elsewhere files are read by ranges anyway
    try:
        with store.open(place, "rb", **streamed) as file:
            data = bytearray()
            while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
                data += more
            return bytes(data)
    except FileNotFoundError:
        return None


def _require_end(data: bytes | None, place: str, limit: int = files.MAX_JSON) -> bytes | None:
    """Raise ShardError for what goes on behind `limit` bytes: it is not what its name says, today and tomorrow."""
    if data is not None and len(data) > limit:
        raise ShardError(f"{place} has more than {limit:,} bytes; it is not what its name says")
    return data


def _folder(cache: ShardCache, *identity: object) -> Path:
    return cache.folder / hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()[:24]
