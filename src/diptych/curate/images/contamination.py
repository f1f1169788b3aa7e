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
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diptych import files
from diptych.curate.images.config import ContaminationConfig
from diptych.curate.images.phash import Found, Hashes, find_near
from diptych.curate.images.prepare import decode_small, on_white
from diptych.curate.images.threshold import MAX_DISTANCE, VIEWS, Curve, hash_decoys, hash_encoded, measure_curve
from diptych.curate.rows import with_reason
from diptych.embed.bulk.inputs import open_column
from diptych.embed.sources import Row, ShardSource, fetch
from diptych.errors import NotFoundError, PictureError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, find_images
from diptych.shards.dataset import DATASET_FILE, load_dataset
from diptych.shards.tombstones import read_tombstones
from diptych.stage.folder import MANIFEST_FILE, part_paths, read_manifest, read_rows
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
_IMAGES = 1024
"""Images of a folder that are hashed by one task."""
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
    promised: bool
    """Whether the threshold is shown to keep the precision that was asked for in a training set of this size."""
    unreadable: dict[str, int]
    """Reason -> pictures of either set."""


def run(config: ContaminationConfig, *, engine: Engine) -> ContaminationReport:
    """Compare the sets and write the result."""
    data = hash_set(config.data, config.out / "data", engine)
    against = hash_set(config.against, config.out / "against", engine)
    sample = _sample(config)
    others = (views for _, views in _iter_hashes(config.out / "data"))
    curve = measure_curve(sample, config.seed).with_decoys(hash_decoys(sample), others)
    _write_curve(curve, config.out / "curve.csv")
    threshold, promised = curve.choose(config.precision, data.kept)
    if config.max_distance is not None:
        threshold, promised = config.max_distance, promised and config.max_distance <= threshold
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
        expected_false=float(curve.false_share(data.kept, at_most=True)[place] * len(keys)),
        promised=promised,
        unreadable=dict(Counter(data.dropped) + Counter(against.dropped)),
    )
    files.write_json(config.out / "contamination.json", asdict(report))
    return report


@dataclass(frozen=True)
class HashPictures:
    """A stage: paths of tars, tables or images -> the hashes of each picture."""

    root: Path = Path()
    """The folder that keys of images count from."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path in batch.column("path").to_pylist():
                keys, views, reasons = [], [], []
                for key, image in iter_pictures(Path(path), self.root):
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


def _hash_or_reason(image: bytes | PictureError) -> Hashes | str:
    if isinstance(image, PictureError):
        return image.reason
    try:
        return hash_encoded(image)
    except PictureError as error:
        return error.reason


def iter_pictures(path: Path, root: Path = Path()) -> Iterator[tuple[str, bytes | PictureError]]:
    """Key and encoded picture, or why there is none, of every row of a tar, a table or a part; or of one image, whose
    key is its path from `root`. Neither captions nor labels are needed."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        rows = iter([Row(path.relative_to(root).as_posix(), path)])
    elif path.suffix == ".tar":
        source = ShardSource.open(path, "image")
        yield from ((key, PictureError(reason, key)) for key, reason in source.lost)
        deleted = read_tombstones(path.parent)
        rows = (row for row in source.read(0, source.rows) if row.id not in deleted)
    else:
        source = open_column(path, _image_column(path), "image")
        keys = (
            None if "key" not in pq.read_schema(path).names else pq.read_table(path, columns=["key"])["key"].to_pylist()
        )
        rows = (row._replace(id=keys[int(row.id)]) if keys else row for row in source.read(0, source.rows))
    for row in rows:
        try:
            yield row.id, cast(bytes, fetch(row))
        except PictureError as error:
            yield row.id, error


def _image_column(path: Path) -> str:
    """The column of a table that holds pictures, by the names that people give it."""
    names = pq.read_schema(path).names
    found = next((name for name in ("image", "img", "picture", "jpg", "bytes") if name in names), None)
    if found is None:
        raise UsageError(f"{path} has no column of pictures called image; it has {', '.join(names)}")
    return found


def picture_files(folder: Path) -> tuple[list[Path], str | None]:
    """The files that hold a set's pictures, and the hash of the stage that wrote them, if one did: parts, shards, the
    tars and Parquet files below a folder, or its images (class folders, for example)."""
    if (folder / MANIFEST_FILE).exists() and not (folder / DATASET_FILE).exists():
        return part_paths(folder), read_manifest(folder).hash
    if not folder.exists():
        raise NotFoundError(f"no such set of pictures: {folder}; name a folder of shards, tars, tables or images")
    if folder.is_file():
        return [folder], None
    if (folder / DATASET_FILE).exists():
        dataset = load_dataset(folder)
        return [shard.path for shard in dataset.shards], dataset.content_hash
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".tar", ".parquet") and path.is_file())
    images = [folder / name for name in find_images(folder)[0]] if not files else []
    if not files and not images:
        raise NotFoundError(f"no pictures in {folder}: no images, .tar or .parquet in it or below")
    return files or images, None


def hash_set(path: Path, out: Path, engine: Engine) -> StageReport:
    """Hash a set's pictures into a stage's folder."""
    inputs, parent = picture_files(path)
    size = _IMAGES if inputs[0].suffix.lower() in IMAGE_SUFFIXES else 1
    tasks = [
        Task(part_name(i), tuple(inputs[at : at + size]), rows=False)
        for i, at in enumerate(range(0, len(inputs), size))
    ]
    root = path if path.is_dir() else path.parent
    return engine.run_stage(HashPictures(root), tasks, out, {"views": VIEWS}, schema=HASHES, parent=parent)


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
        for key, image in iter_pictures(path, config.against):
            if key in wanted and not isinstance(image, PictureError):
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
