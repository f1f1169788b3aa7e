"""How much of an evaluation set is in a training set: near-duplicates, as section 5 of the paper asks.

    out/data/, out/against/    hashes of both sets' pictures, made as a stage (resumed, spread, counted)
    out/curve.csv              distance, recall, precision, recall of each change; the threshold is read off it
    out/overlap.parquet        a row for each picture of the evaluation set that has a copy: key, train_key, distance,
                               score (1 - distance / 64), copies (how many pictures of the training set)
    out/contamination.json     the threshold and what it promises, sizes, share of overlap

The evaluation room turns the keys into accuracy with and without the overlap.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diptych import files
from diptych.curate.images.config import ContaminationConfig
from diptych.curate.images.phash import Found, Hashes, find_near
from diptych.curate.images.prepare import decode_small, on_white
from diptych.curate.images.threshold import MAX_DISTANCE, VIEWS, Curve, hash_encoded, measure_curve
from diptych.curate.rows import with_reason
from diptych.errors import NotFoundError, PictureError, UsageError
from diptych.shards.dataset import DATASET_FILE, load_dataset
from diptych.stage.folder import MANIFEST_FILE, part_paths, read_manifest, read_part, read_rows
from diptych.stage.job import Task
from diptych.stage.run import Engine, StageReport, part_name

HASHES = pa.schema([pa.field("key", pa.string()), pa.field("views", pa.list_(pa.uint64(), VIEWS))])
OVERLAP = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("train_key", pa.string(), nullable=False),
        pa.field("distance", pa.uint8(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("copies", pa.int64(), nullable=False),
    ]
)
_ROWS = 1024
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ContaminationReport:
    """What was found."""

    pictures: int
    """Pictures of the training set that could be read."""
    against: int
    """Pictures of the evaluation set that could be read."""
    overlapping: int
    """Pictures of the evaluation set that have a copy in the training set."""
    share: float
    """overlapping / against."""
    max_distance: int
    """The threshold, bits of 64."""
    recall: float
    """Share of the made copies that the threshold finds."""
    precision: float
    """Share of copies in what it finds, among the made pairs."""
    expected_false: float
    """Pictures of the evaluation set that would be found by chance if the sets had nothing in common, at most."""
    unreadable: dict[str, int]
    """Reason -> pictures of either set."""


def run(config: ContaminationConfig, *, engine: Engine) -> ContaminationReport:
    """Compare the sets and write the result."""
    data = hash_set(config.data, config.out / "data", engine)
    against = hash_set(config.against, config.out / "against", engine)
    curve = measure_curve(_sample(config), config.seed)
    threshold = curve.choose(config.precision) if config.max_distance is None else config.max_distance
    _write_curve(curve, config.out / "curve.csv")
    keys, views = read_hashes(config.out / "against")
    overlap = compare(keys, views, _iter_hashes(config.out / "data"), threshold)
    _write_table(overlap, config.out / "overlap.parquet")
    place = min(threshold, MAX_DISTANCE)
    report = ContaminationReport(
        pictures=data.kept,
        against=len(keys),
        overlapping=overlap.num_rows,
        share=overlap.num_rows / max(len(keys), 1),
        max_distance=threshold,
        recall=float(curve.recall[place]),
        precision=float(curve.precision[place]),
        expected_false=float(min(1.0, curve.false_rate[place] * data.kept) * len(keys)),
        unreadable=dict(Counter(data.dropped) + Counter(against.dropped)),
    )
    files.write_json(config.out / "contamination.json", asdict(report))
    return report


@dataclass(frozen=True)
class HashPictures:
    """A stage: paths of tars or of parts with pictures -> the hashes of each picture."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path in batch.column("path").to_pylist():
                keys, views, reasons = [], [], []
                for key, image in iter_pictures(Path(path)):
                    found = _hash_or_reason(image)
                    keys.append(key)
                    views.append(None if isinstance(found, str) else found.tolist())
                    reasons.append(found if isinstance(found, str) else None)
                    if len(keys) == _ROWS:
                        yield _hash_batch(keys, views, reasons)
                        keys, views, reasons = [], [], []
                yield _hash_batch(keys, views, reasons)


def _hash_batch(keys: list, views: list, reasons: list) -> pa.RecordBatch:
    columns = [pa.array(keys, HASHES.field(0).type), pa.array(views, HASHES.field(1).type)]
    return with_reason(pa.RecordBatch.from_arrays(columns, schema=HASHES), reasons)


def _hash_or_reason(image: bytes | None) -> Hashes | str:
    try:
        return hash_encoded(image) if image else "empty"
    except PictureError as error:
        return error.reason


def iter_pictures(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Key and encoded picture of every row of a tar or of a part."""
    if path.suffix == ".parquet":
        for batch in read_part(path, ["key", "image"]):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
    else:
        for pair in load_dataset(path).pairs:
            yield pair.key, pair.image


def picture_files(folder: Path) -> tuple[list[Path], str | None]:
    """The files that hold a set's pictures, and the hash of the stage that wrote them, if one did."""
    if (folder / MANIFEST_FILE).exists() and not (folder / DATASET_FILE).exists():
        return part_paths(folder), read_manifest(folder).hash
    if not folder.exists():
        raise NotFoundError(f"no such set of pictures: {folder}; name a folder of shards, a tar, or a stage's folder")
    dataset = load_dataset(folder)
    return [shard.path for shard in dataset.shards], dataset.content_hash


def hash_set(path: Path, out: Path, engine: Engine) -> StageReport:
    """Hash a set's pictures into a stage's folder."""
    inputs, parent = picture_files(path)
    tasks = [Task(part_name(i), (one,), rows=False) for i, one in enumerate(inputs)]
    return engine.run_stage(HashPictures(), tasks, out, {"views": VIEWS}, schema=HASHES, parent=parent)


def _iter_hashes(folder: Path) -> Iterator[tuple[list[str], Hashes]]:
    for batch in read_rows(folder):
        if batch.num_rows:
            views = batch.column("views").flatten().to_numpy().reshape(-1, VIEWS)
            yield batch.column("key").to_pylist(), views


def read_hashes(folder: Path) -> tuple[list[str], Hashes]:
    """Keys, and hashes [N, VIEWS], of a folder that `hash_set` wrote."""
    keys: list[str] = []
    views = [np.empty((0, VIEWS), np.uint64)]
    for some, found in _iter_hashes(folder):
        keys += some
        views.append(found)
    return keys, np.concatenate(views)


def compare(keys: Sequence[str], views: Hashes, data: Iterator[tuple[list[str], Hashes]], threshold: int) -> pa.Table:
    """The nearest picture of `data` for each key that has one within `threshold`; ties go to the first."""
    best = np.full(len(keys), 255, np.uint8)
    nearest = [""] * len(keys)
    copies = np.zeros(len(keys), np.int64)
    for some, found in _chunks(data):
        mine, theirs, distance = _pairs(views, found, threshold)
        copies += np.bincount(mine, minlength=len(keys))
        for i, j, bits in zip(mine.tolist(), theirs.tolist(), distance.tolist(), strict=True):
            if bits < best[i]:
                best[i], nearest[i] = bits, some[j]
    chosen = np.flatnonzero(copies).tolist()
    return pa.table(
        {
            "key": [keys[i] for i in chosen],
            "train_key": [nearest[i] for i in chosen],
            "distance": best[chosen],
            "score": 1 - best[chosen] / 64,
            "copies": copies[chosen],
        },
        schema=OVERLAP,
    )


def _chunks(data: Iterator[tuple[list[str], Hashes]]) -> Iterator[tuple[list[str], Hashes]]:
    keys: list[str] = []
    views: list[Hashes] = []
    for some, found in data:
        keys += some
        views.append(found)
        if len(keys) >= _CHUNK:
            yield keys, np.concatenate(views)
            keys, views = [], []
    if keys:
        yield keys, np.concatenate(views)


def _pairs(mine: Hashes, theirs: Hashes, threshold: int) -> Found:
    """(i, j, distance) of all pairs within the threshold by their nearest views; sorted by i, then j."""
    found = []
    for view in range(VIEWS):
        found.append(find_near(mine[:, view], theirs[:, 0], threshold))
        if view:
            found.append(find_near(mine[:, 0], theirs[:, view], threshold))
    i, j, bits = (np.concatenate([one[k] for one in found]) for k in range(3))
    order = np.lexsort((bits, j, i))
    i, j, bits = i[order], j[order], bits[order]
    first = np.ones(len(i), bool)
    first[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
    return i[first], j[first], bits[first]


def _sample(config: ContaminationConfig) -> list[Image.Image]:
    """Some pictures of the evaluation set, not too large; the same ones for the same seed."""
    keys, _ = read_hashes(config.out / "against")
    if len(keys) < 2:
        raise UsageError(f"{config.against} has {len(keys)} pictures that can be read; a curve needs at least 2")
    rng = np.random.default_rng(config.seed)
    chosen = set(rng.permutation(len(keys))[: config.samples].tolist())
    wanted = {keys[i] for i in chosen}
    pictures = []
    for path in picture_files(config.against)[0]:
        for key, image in iter_pictures(path):
            if key in wanted and image:
                wanted.discard(key)
                picture = on_white(decode_small(image, 512))
                picture.thumbnail((512, 512))
                pictures.append(picture)
    return pictures


def _write_curve(curve: Curve, path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["distance", "recall", "precision", "false_rate", *curve.recall_by_change])
    for distance in range(MAX_DISTANCE + 1):
        row = [curve.recall[distance], curve.precision[distance], curve.false_rate[distance]]
        row += [recall[distance] for recall in curve.recall_by_change.values()]
        writer.writerow([distance, *(f"{value:.6g}" for value in row)])
    files.write_bytes(path, text.getvalue().encode())


def _write_table(table: pa.Table, path: Path) -> None:
    with files.atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
