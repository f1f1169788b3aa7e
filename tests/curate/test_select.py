import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fetching import engine
from PIL import ImageOps
from test_contamination import scene

from diptych.curate.images.config import PicturesConfig
from diptych.curate.images.prepare import hash_picture
from diptych.curate.images.select import FACTS, decide, run
from diptych.curate.rows import CANDIDATES, with_reason
from diptych.errors import UsageError
from diptych.pair import Pair
from diptych.shards.write import write_shards
from diptych.stage.folder import read_rows
from diptych.stage.job import Task
from diptych.stage.run import part_name
from samples import encode


@dataclass(frozen=True)
class Same:
    """A stage that keeps all rows."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield with_reason(batch, [None] * batch.num_rows)


def write_rows(folder: Path, images: dict[str, bytes | None], per_part: int = 5) -> Path:
    """A finished stage with these pictures."""
    rows = [
        {"key": key, "caption": f"text of {key}", "image": image, "image_url": key, "page_url": "p", "details": "{}"}
        for key, image in images.items()
    ]
    folder.mkdir()
    tasks = []
    for start in range(0, len(rows), per_part):
        path = folder / f"{start}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[start : start + per_part], schema=CANDIDATES), path)
        tasks.append(Task(part_name(len(tasks)), (path,)))
    engine.run_stage(Same(), tasks, folder / "pictures", {}, schema=CANDIDATES)
    return folder / "pictures"


def kept(folder) -> list[str]:
    return [row["key"] for batch in read_rows(folder) for row in batch.to_pylist()]


def test_copies_and_pictures_that_are_tested_on_are_dropped_with_their_reason(tmp_path):
    write_shards([Pair(key="e", caption="e", image=encode(scene(5)))], tmp_path / "tested")
    images = {
        "a": encode(scene(1)),
        "b": encode(scene(2)),
        "a-again": encode(scene(1)),
        "a-smaller": encode(scene(1).resize((80, 60))),
        "tested": encode(scene(5), quality=50),
        "tested-mirrored": encode(ImageOps.mirror(scene(5))),
        "c": encode(scene(3)),
        "broken": b"\xff\xd8\xff and no more",
        "none": None,
    }
    folder = write_rows(tmp_path / "in", images)
    config = PicturesConfig(folder=folder, out=tmp_path / "out", evaluation=(tmp_path / "tested",))
    report = run(config, engine=engine)
    assert kept(config.out) == ["a", "b", "c"]
    dropped = {"duplicate": 1, "near_duplicate": 1, "evaluation": 2, "empty": 1}
    assert {k: v for k, v in report.dropped.items() if k in dropped} == dropped
    assert report.kept + sum(report.dropped.values()) == len(images)
    assert run(config, engine=engine).hash == report.hash


def test_pictures_of_another_colour_are_no_copies(tmp_path):
    grey = scene(1).convert("L")
    images = {
        "a": encode(ImageOps.colorize(grey, "black", "yellow")),
        "other": encode(ImageOps.colorize(grey, "black", "cyan")),
        "a-again": encode(ImageOps.colorize(grey, "black", "yellow"), quality=60),
    }
    greys = [hash_picture(image) for image in images.values()]
    assert max(int(greys[0] ^ grey).bit_count() for grey in greys) <= 6
    config = PicturesConfig(folder=write_rows(tmp_path / "in", images), out=tmp_path / "out", max_distance=6)
    assert run(config, engine=engine).dropped == {"near_duplicate": 1}
    assert kept(config.out) == ["a", "other"]


def test_a_listed_picture_does_not_stay(tmp_path):
    images = {"a": encode(scene(1)), "b": encode(scene(2))}
    (tmp_path / "list").write_text(hashlib.sha1(images["a"]).hexdigest())
    folder = write_rows(tmp_path / "in", images)
    config = PicturesConfig(folder=folder, out=tmp_path / "out", known_hashes=(tmp_path / "list",))
    assert run(config, engine=engine).dropped == {"known_hash": 1}


def score(images: Sequence[bytes], captions: Sequence[str]) -> Sequence[float]:
    return [0.9 if caption.endswith("b") else 0.1 for caption in captions]


def test_pairs_that_do_not_fit_are_dropped_by_a_given_score(tmp_path):
    folder = write_rows(tmp_path / "in", {"a": encode(scene(1)), "b": encode(scene(2))})
    config = PicturesConfig(folder=folder, out=tmp_path / "out", min_score=0.3)
    assert run(config, engine=engine, score=score).dropped == {"score": 1}
    assert kept(config.out) == ["b"]
    with pytest.raises(UsageError, match="belong together"):
        run(config, engine=engine)


def test_several_pairs_of_a_picture_may_stay_and_dropped_ones_do_not_count():
    rows = [
        {"sha256": "x", "phash": 7, "colour": 0, "known": None, "score": 0.1, "broken": None},
        {"sha256": "x", "phash": 7, "colour": 0, "known": None, "score": 0.9, "broken": None},
        {"sha256": "x", "phash": 7, "colour": 0, "known": None, "score": 0.9, "broken": None},
        {"sha256": "y", "phash": 7, "colour": 0, "known": None, "score": 0.9, "broken": None},
        {"sha256": "z", "phash": 2**63, "colour": 0, "known": None, "score": float("nan"), "broken": None},
        {"sha256": "w", "phash": 0xFF << 20, "colour": 0, "known": None, "score": 0.9, "broken": None},
    ]
    table = pa.Table.from_pylist(rows, schema=FACTS)
    nothing = np.empty(0, np.uint64)

    def reasons(**changes):
        return decide(table, PicturesConfig(folder=Path(), out=Path(), min_score=0.5, **changes), nothing)

    assert reasons() == ["score", None, "duplicate", "near_duplicate", "score", None]
    assert reasons(per_picture=2) == ["score", None, None, "near_duplicate", "score", None]
    assert reasons(near=False) == ["score", None, "duplicate", None, "score", None]
