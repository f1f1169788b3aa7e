"""Candidates -> those that are no copy of another: the same pair found again, or nearly the same text.

Two stages with a comparison between them. `ComputeSignatures` gives each row a MinHash signature of its text's
three-letter pieces, cut into bands; texts that share a band are compared by their signatures, those similar enough are
joined, and of all that are joined, directly or over others, one stays: the one whose hash of (seed, key, page) is
smallest. So neither the order of the rows nor how they lie in files matters. `DropDuplicates` writes the
verdicts onto the rows.

The bands are compared in `buckets`, one after the other, so that memory is bounded by the largest of them; over all
of it some 40 bytes a row are held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from diptych import files
from diptych.curate.rows import CANDIDATES, with_reason
from diptych.curate.text.config import NearTextConfig, Scope
from diptych.curate.text.words import normalise
from diptych.errors import ShardError
from diptych.shards.order import mix
from diptych.stage.folder import part_paths, read_manifest, read_part
from diptych.stage.run import Engine, StageReport, Task, part_name, tasks_of

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

SIGNED = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("rank", pa.uint64(), nullable=False),
        pa.field("bands", pa.list_(pa.uint64()), nullable=False),
        pa.field("signature", pa.binary(), nullable=False),
    ]
)
"""`key`: hash of a row's key; `rank`: the smallest of several copies stays; `signature`: a byte per hash."""

U64 = NDArray[np.uint64]
_RECORD = "verdicts.json"
"""Written last: what the verdicts beside it were made of, and their check sums."""
_TEXTS = 256  # signed at a time
_REASONS = np.array([None, DUPLICATE, NEAR_DUPLICATE], dtype=object)


@dataclass(frozen=True, kw_only=True)
class ComputeSignatures:
    """Stage: candidates to rows of SIGNED; none is dropped."""

    scope: Scope
    similarity: float
    hashes: int
    seed: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Sign the rows batch by batch."""
        hasher = MinHash(self.hashes, self.seed)
        rows = band_rows(self.hashes, self.similarity)
        for batch in batches:
            keys, pages = batch.column("key").to_pylist(), batch.column("page_url").to_pylist()
            signatures = hasher(batch.column("caption").to_pylist())
            places = zip(batch.column("image_url").to_pylist(), pages, strict=True)
            scopes = np.array([_hash(self._scope_of(*place)) for place in places], dtype=np.uint64)
            bands = signatures.reshape(len(keys), self.hashes // rows, rows)
            cut = np.zeros(bands.shape[:2], dtype=np.uint64)
            for row in range(rows):
                cut = mix(cut ^ bands[:, :, row])
            cut = mix(cut ^ scopes[:, None] ^ np.arange(cut.shape[1], dtype=np.uint64))
            small = (signatures & np.uint64(255)).astype(np.uint8)
            ranks = [_hash(f"{self.seed}\0{key}\0{page}") for key, page in zip(keys, pages, strict=True)]
            columns = [
                pa.array([_hash(key) for key in keys], pa.uint64()),
                pa.array(ranks, pa.uint64()),
                pa.array(list(cut), pa.list_(pa.uint64())),
                pa.array([row.tobytes() for row in small], pa.binary()),
            ]
            yield with_reason(pa.RecordBatch.from_arrays(columns, schema=SIGNED), [None] * len(keys))

    def _scope_of(self, image_url: str | None, page_url: str | None) -> str:
        if self.scope == "image":
            return image_url or ""
        return _host_of(page_url or "") if self.scope == "site" else ""


@dataclass(frozen=True, kw_only=True)
class DropDuplicates:
    """Stage: paths of parts in, their rows out, each with its verdict."""

    verdicts: str
    """Folder with an array for each part."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Read part after part."""
        for paths in batches:
            for path in paths.column("path").to_pylist():
                verdicts = np.load(Path(self.verdicts) / f"{Path(path).stem}.npy", allow_pickle=False)
                start = 0
                for batch in read_part(Path(path)):
                    chosen = verdicts[start : start + len(batch)]
                    start += len(batch)
                    if start > len(verdicts):
                        break
                    yield with_reason(batch, _REASONS[chosen].tolist())
                if start != len(verdicts):
                    raise ShardError(f"{path} has not the {len(verdicts)} rows that were judged; run the stage anew")


class MinHash:
    """Signatures of texts: for each of `hashes` hash functions the smallest over a text's three-letter pieces."""

    def __init__(self, hashes: int, seed: int) -> None:
        start = _hash(f"minhash\0{seed}")
        numbers = mix(np.arange(2 * hashes, dtype=np.uint64) + np.uint64(start))
        self._multiply, self._add = numbers[:hashes] | np.uint64(1), numbers[hashes:]

    def __call__(self, texts: list[str]) -> U64:
        """One row a text; the upper 32 bits of products, so each number is below 2^32."""
        parts = [self._sign(texts[i : i + _TEXTS]) for i in range(0, len(texts), _TEXTS)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self._add)), dtype=np.uint64)

    def _sign(self, texts: list[str]) -> U64:
        pieces = [_pieces(text) for text in texts]
        starts = np.concatenate([[0], np.cumsum([len(one) for one in pieces])[:-1]])
        together = np.concatenate(pieces)
        signed = np.empty((len(texts), len(self._add)), dtype=np.uint64)
        for number, (multiply, add) in enumerate(zip(self._multiply, self._add, strict=True)):
            signed[:, number] = np.minimum.reduceat((together * multiply + add) >> np.uint64(32), starts)
        return signed


def _pieces(text: str) -> U64:
    """Hashes of the three-letter pieces of a text's words; of the text itself if it has no word."""
    plain = normalise(text)
    if not plain:
        return np.array([_hash(text)], dtype=np.uint64)
    codes = np.frombuffer(f" {plain} ".encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    joined = codes[:-2] | (codes[1:-1] << np.uint64(21)) | (codes[2:] << np.uint64(42))
    return mix(joined)


def band_rows(hashes: int, similarity: float) -> int:
    """Hashes per band: the most with which texts of this similarity still share a band almost surely."""
    divisors = (rows for rows in range(1, hashes) if hashes % rows == 0)
    return max(rows for rows in divisors if (rows / hashes) ** (1 / rows) <= similarity - 0.05)


def run(config: NearTextConfig, *, engine: Engine) -> StageReport:
    """Sign, compare, drop; signatures and verdicts lie in folders beside the output's."""
    tasks, parent = tasks_of(config.folder), read_manifest(config.folder).hash
    signed, verdicts = (config.out.with_name(f"{config.out.name}_{part}") for part in ("signed", "verdicts"))
    stage = ComputeSignatures(scope=config.scope, similarity=config.similarity, hashes=config.hashes, seed=config.seed)
    report = engine.run_stage(stage, tasks, signed, stage, schema=SIGNED, parent=parent)
    _write_verdicts(config, signed, report.hash, verdicts, [f"{Path(task.inputs[0]).stem}.npy" for task in tasks])
    strikes = [Task(part_name(i), task.inputs, rows=False) for i, task in enumerate(tasks)]
    decides: dict[str, Any] = {
        "near": config.near,
        "scope": config.scope,
        "similarity": config.similarity,
        "hashes": config.hashes,
        "seed": config.seed,
        "signed": report.hash,
    }
    return engine.run_stage(
        DropDuplicates(verdicts=str(verdicts)), strikes, config.out, decides, schema=CANDIDATES, parent=parent
    )


def _write_verdicts(config: NearTextConfig, signed: Path, signed_hash: str, folder: Path, names: list[str]) -> None:
    """Compare, unless an earlier run did so with the same signatures and its verdicts are still whole."""
    inputs = {"signed": signed_hash, "near": config.near, "similarity": config.similarity}
    if _read_record(folder) == {**inputs, "verdicts": _sums(folder, names)}:
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(folder)
    (folder / _RECORD).unlink(missing_ok=True)
    found = judge(part_paths(signed), near=config.near, similarity=config.similarity, buckets=config.buckets)
    for name, verdict in zip(names, found, strict=True):
        with files.atomic_file(folder / name) as path, open(path, "wb") as handle:
            np.save(handle, verdict)
    files.write_json(folder / _RECORD, {**inputs, "verdicts": _sums(folder, names)})


def _read_record(folder: Path) -> Any:
    """What the verdicts there were made of; None if they were not finished."""
    try:
        return files.read_json(folder / _RECORD)
    except (FileNotFoundError, ValueError):
        return None


def _sums(folder: Path, names: list[str]) -> dict[str, str | None]:
    return {name: files.sha256(folder / name) if (folder / name).exists() else None for name in names}


def judge(paths: list[Path], *, near: bool, similarity: float, buckets: int) -> list[NDArray[np.uint8]]:
    """For each part of signed rows: 0 stays, 1 is a duplicate, 2 a near duplicate."""
    columns = [_read_columns(path) for path in paths]
    sizes = [len(keys) for keys, _ in columns]
    keys, ranks = (np.concatenate([part[i] for part in columns]) if columns else np.zeros(0, np.uint64) for i in (0, 1))
    verdicts = np.zeros(len(keys), dtype=np.uint8)
    place = _places(ranks)
    for group in _groups(keys, place):
        verdicts[group[1:]] = 1
    if near:
        parents = np.arange(len(keys))
        for bucket in range(buckets):
            _join_bucket(paths, bucket, buckets, verdicts, place, parents, similarity)
        rows = np.flatnonzero(verdicts == 0)
        roots = np.array([_root(parents, int(row)) for row in rows], dtype=np.int64)
        verdicts[rows[roots != rows]] = 2
    return np.split(verdicts, np.cumsum(sizes)[:-1]) if sizes else []


def _read_columns(path: Path) -> tuple[U64, U64]:
    batches = list(read_part(path, ["key", "rank"]))
    table = pa.Table.from_batches(batches, pa.schema([SIGNED.field("key"), SIGNED.field("rank")]))
    return table["key"].to_numpy(), table["rank"].to_numpy()


def _places(ranks: U64) -> NDArray[np.int64]:
    """Where each row stands when all are sorted by rank; rows of one rank are the same in all that counts."""
    place = np.empty(len(ranks), dtype=np.int64)
    place[np.argsort(ranks, kind="stable")] = np.arange(len(ranks))
    return place


def _groups(values: U64, place: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows that share a value, two or more, each group in order of place."""
    order = np.lexsort((place, values))
    ends = np.flatnonzero(np.diff(values[order])) + 1
    for start, end in zip(np.concatenate([[0], ends]), np.concatenate([ends, [len(order)]]), strict=True):
        if end - start > 1:
            yield order[start:end]


def _join_bucket(
    paths: list[Path],
    bucket: int,
    buckets: int,
    verdicts: NDArray[np.uint8],
    place: NDArray[np.int64],
    parents: NDArray[np.int64],
    similarity: float,
) -> None:
    """Join rows that share a band of this bucket and are similar to the first of those that do."""
    values, rows, signatures = _read_bucket(paths, bucket, buckets, verdicts)
    for group in _groups(values, place[rows]):
        first, rest = group[0], group[1:]
        same = (signatures[rest] == signatures[first]).mean(axis=1)
        for member in rest[same >= similarity]:
            _join(parents, place, int(rows[first]), int(rows[member]))


def _read_bucket(
    paths: list[Path], bucket: int, buckets: int, verdicts: NDArray[np.uint8]
) -> tuple[U64, NDArray[np.int64], NDArray[np.uint8]]:
    """Bands of a bucket, the row of each, and the signature of that row."""
    values, rows, signatures = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], []
    start = 0
    for path in paths:
        for batch in read_part(path, ["bands", "signature"]):
            count = len(batch)
            bands = batch.column("bands").flatten().to_numpy().reshape(count, -1)
            hit, column = np.nonzero(bands % np.uint64(buckets) == bucket)
            alive = verdicts[start + hit] == 0
            hit, column = hit[alive], column[alive]
            values.append(bands[hit, column])
            rows.append(start + hit)
            signed = np.frombuffer(b"".join(batch.column("signature").to_pylist()), np.uint8).reshape(count, -1)
            signatures.append(signed[hit])
            start += count
    empty = np.zeros((0, 0), np.uint8)
    return np.concatenate(values), np.concatenate(rows), np.concatenate(signatures) if signatures else empty


def _root(parents: NDArray[np.int64], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = int(parents[row])
    return row


def _join(parents: NDArray[np.int64], place: NDArray[np.int64], a: int, b: int) -> None:
    """One group of two; its root is the row of the lowest place."""
    a, b = _root(parents, a), _root(parents, b)
    if place[a] > place[b]:
        a, b = b, a
    parents[b] = a


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
