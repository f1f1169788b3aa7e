import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fetching import engine
from PIL import Image, ImageFilter, ImageOps

from diptych.curate.images.config import ContaminationConfig
from diptych.curate.images.contamination import compare, run
from diptych.curate.images.prepare import hash_picture
from diptych.curate.images.threshold import CHANGES, VIEWS, distances, hash_encoded, hash_views, measure_curve
from diptych.errors import NotFoundError, UsageError
from diptych.pair import Pair
from diptych.shards.write import write_shards
from samples import encode


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with large and small things in it, of its own for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(coarse, fine.filter(ImageFilter.GaussianBlur(1)), 0.3)


def pairs(pictures: dict[str, Image.Image]) -> list[Pair]:
    return [Pair(key=key, caption="a scene", image=encode(picture)) for key, picture in pictures.items()]


@pytest.fixture(scope="module")
def curve():
    return measure_curve([scene(seed) for seed in range(25)])


def test_copies_are_told_from_other_pictures(curve):
    place, shown = curve.choose(0.99)
    assert place >= 4
    assert shown
    assert curve.precision[place] >= 0.99
    assert curve.recall[place] > 0.7
    assert np.all(np.diff(curve.recall) >= 0)
    assert curve.copies == 25 * len(CHANGES)
    assert curve.others == 25 * 24 * len(CHANGES)


@pytest.mark.parametrize("change", ["saved_again", "half_size", "squashed", "mirrored", "flatter", "grey", "square"])
def test_common_changes_are_seen_through(curve, change):
    assert curve.recall_by_change[change][6] > 0.9


def test_a_set_of_equal_pictures_has_no_false_pairs():
    same = measure_curve([scene(1)] * 3)
    assert same.others == 0
    assert same.precision.tolist() == [1.0] * len(same.precision)


def test_views_find_a_mirrored_and_a_cut_picture():
    whole = scene(3)
    mine = np.stack([hash_views(whole)])
    for other in (ImageOps.mirror(whole), whole.crop((0, 0, 144, 108))):
        theirs = np.stack([hash_views(other)])
        assert distances(mine, theirs)[0, 0] <= 6
        assert int(np.bitwise_count(mine[0, 0] ^ theirs[0, 0])) > 6
    assert mine.shape == (1, VIEWS)


def test_comparing_by_bands_equals_comparing_all():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2**64, (200, VIEWS), dtype=np.uint64)
    mine = rng.integers(0, 2**64, (30, VIEWS), dtype=np.uint64)
    for i in range(0, 30, 2):  # plant copies: a view of one is near the whole of the other
        bits = sum(1 << int(b) for b in rng.choice(64, i % 8, replace=False))
        (mine if i % 4 else data)[i, i % VIEWS] = (data if i % 4 else mine)[i, 0] ^ np.uint64(bits)
    apart = distances(mine, data)
    for threshold in (3, 6, 9):
        blocks = (([f"t{i}" for i in range(a, a + 50)], data[a : a + 50]) for a in range(0, 200, 50))
        table = compare([f"e{i}" for i in range(30)], mine, blocks, threshold)
        near = apart <= threshold
        assert table.column("key").to_pylist() == [f"e{i}" for i in np.flatnonzero(near.any(1))]
        assert table.column("distance").to_pylist() == apart.min(1)[near.any(1)].tolist()
        assert table.column("train_key").to_pylist() == [f"t{i}" for i in apart.argmin(1)[near.any(1)]]
        assert table.column("copies").to_pylist() == near.sum(1)[near.any(1)].tolist()
        assert near.any()


def test_the_overlap_of_two_sets_of_shards_is_found(tmp_path):
    tested = {f"e{i}": scene(i) for i in range(20)}
    copied = {
        "plain": scene(0),
        "mirrored": ImageOps.mirror(scene(1)),
        "small": scene(2).resize((80, 60)),
        "again": scene(2),
    }
    write_shards(pairs({f"t{i}": scene(1000 + i) for i in range(30)} | copied), tmp_path / "train", samples_per_shard=9)
    write_shards(pairs(tested), tmp_path / "test", samples_per_shard=9)
    config = ContaminationConfig(data=tmp_path / "train", against=tmp_path / "test", out=tmp_path / "out", samples=20)
    report = run(config, engine=engine)
    assert (report.pictures, report.against, report.overlapping) == (34, 20, 3)
    rows = {row["key"]: row for row in pq.read_table(config.out / "overlap.parquet").to_pylist()}
    assert {key: (row["train_key"], row["copies"]) for key, row in rows.items()} == {
        "e0": ("plain", 1),
        "e1": ("mirrored", 1),
        "e2": ("small", 2),
    }
    assert rows["e0"]["score"] == 1.0
    lines = list(csv.DictReader(io.StringIO((config.out / "curve.csv").read_text())))
    chosen = lines[report.max_distance]
    assert float(chosen["precision"]) >= 0.99
    assert float(chosen["recall"]) == pytest.approx(report.recall, rel=1e-4)
    assert json.loads((config.out / "contamination.json").read_text())["overlapping"] == 3
    assert run(config, engine=engine) == report


def test_a_threshold_may_be_given_and_one_picture_makes_no_curve(tmp_path):
    write_shards(pairs({"a": scene(1), "b": scene(2)}), tmp_path / "two")
    write_shards(pairs({"c": scene(1)}), tmp_path / "one")
    given = ContaminationConfig(data=tmp_path / "one", against=tmp_path / "two", out=tmp_path / "o", max_distance=0)
    assert run(given, engine=engine).max_distance == 0
    with pytest.raises(UsageError, match="at least 2"):
        run(
            ContaminationConfig(data=tmp_path / "two", against=tmp_path / "one", out=tmp_path / "p"),
            engine=engine,
        )
    with pytest.raises(NotFoundError, match="no such set"):
        run(ContaminationConfig(data=tmp_path / "no", against=tmp_path / "one", out=tmp_path / "q"), engine=engine)


def test_the_first_view_is_the_hash_that_the_filters_use():
    for seed in range(5):
        data = encode(scene(seed, (700, 500)))
        assert int(hash_encoded(data)[0]) == hash_picture(data)


def blobs(seed: int) -> Image.Image:
    """A few soft blobs: different pictures whose hashes are often near each other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    grey = np.zeros((48, 64))
    for _ in range(4):
        cx, cy, size, weight = rng.uniform(0, 64), rng.uniform(0, 48), rng.uniform(6, 24), rng.uniform(-1, 1)
        grey += weight * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2))
    return Image.fromarray(np.uint8(255 * (grey - grey.min()) / np.ptp(grey))).convert("RGB")


@pytest.mark.parametrize("tested", [8, 30])
def test_pictures_that_have_nothing_in_common_are_no_copies_however_many_there_are(tmp_path, tested):
    write_shards(pairs({f"t{i}": blobs(1000 + i) for i in range(700)}), tmp_path / "train")
    write_shards(pairs({f"e{i}": blobs(i) for i in range(tested)}), tmp_path / "test")
    config = ContaminationConfig(data=tmp_path / "train", against=tmp_path / "test", out=tmp_path / "out")
    report = run(config, engine=engine)
    assert report.overlapping <= 1
    assert not report.promised
    assert report.expected_false >= report.overlapping


def test_any_set_of_pictures_can_be_asked_about(tmp_path):
    """As people have evaluation sets: class folders, tars of labels, tables of bytes; captions are not needed."""
    drawn = {f"{'ab'[i % 2]}/{i}.png": encode(scene(i), "PNG") for i in range(6)}
    write_shards(pairs({"t0": scene(0), "t1": scene(100)}), tmp_path / "train")
    for name, data in drawn.items():
        (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / name).write_bytes(data)
    (tmp_path / "folders/a/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "wds/test").mkdir(parents=True)
    with tarfile.open(tmp_path / "wds/test/0.tar", "w") as tar:
        for name, data in drawn.items():
            for suffix, content in (("png", data), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name[2:-4]}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "table").mkdir()
    table = pa.table({"image": [{"bytes": data, "path": None} for data in drawn.values()], "label": [0] * 6})
    pq.write_table(table, tmp_path / "table/test.parquet")
    (tmp_path / "table/empty").mkdir()
    pq.write_table(table.slice(0, 0), tmp_path / "table/empty/test.parquet")
    for name, key in (("folders", "a/0.png"), ("wds", "0"), ("table", "0")):
        config = ContaminationConfig(data=tmp_path / "train", against=tmp_path / name, out=tmp_path / f"out-{name}")
        report = run(config, engine=engine)
        assert (report.against, report.overlapping) == (6, 1), name
        assert pq.read_table(config.out / "overlap.parquet")["key"].to_pylist() == [key]
        assert report.unreadable == ({"not_a_picture": 1} if name == "folders" else {})
