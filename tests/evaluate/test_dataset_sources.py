import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exams import NAMES, npy, pictures, write_captions, write_own, write_shapes, write_wds

from diptych.checkpoint import layouts
from diptych.embed.sources import fetch
from diptych.errors import DatasetError, DownloadError, NotFoundError, UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.download import fetch_wds, locate
from diptych.evaluate.datasets.labels import doubt_names, index_labels
from diptych.evaluate.datasets.layouts import find_layout, open_samples
from diptych.evaluate.datasets.registry import OWN, Dataset, Place, Profile, guess_place, load_dataset_entry, load_own
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.run import run
from samples import TINY_VIT, make_loaded, write_samples, write_tar


def read(samples):
    """Every picture's bytes."""
    return [fetch(row) for row in samples.rows.read(range(len(samples)))]


def reopen(path, kind="single", split="test", **place):
    return open_samples(Place(**place), path, split, kind)


def expected(samples):
    return {key: (number, data) for key, number, data in pictures()} == {
        key: (label, data) for key, label, data in zip(samples.keys, samples.labels, read(samples), strict=True)
    }


# --- layouts ---


def test_wds_folders_are_read_in_place(tmp_path):
    samples = reopen(write_shapes(tmp_path / "wds"))
    assert samples.layout == "wds"
    assert expected(samples)
    assert samples.classnames == NAMES
    assert samples.templates == ("a drawing of a {}.",)
    with pytest.raises(NotFoundError, match="no split train"):
        reopen(tmp_path / "wds", split="train")


def test_wds_of_several_labels_and_of_captions(tmp_path):
    several = [(key, npy([1, 0, 0, int(number == 3)]), data) for key, number, data in pictures()]
    assert reopen(write_wds(tmp_path / "multi", several, "npy"), "multi").labels[3] == (0, 3)
    captions = reopen(write_captions(tmp_path / "captions"), "captions")
    assert captions.labels[0] == ("a red circle", "circle in red", "the first")
    with pytest.raises(DatasetError, match="says retrieval, the dataset is of kind single"):
        reopen(tmp_path / "captions")


def test_keys_that_begin_anew_in_every_shard_stay_apart(tmp_path):
    for number in range(2):
        (tmp_path / "test").mkdir(exist_ok=True)
        write_tar(tmp_path / "test" / f"{number}.tar", [("0.cls", b"1"), ("0.jpg", b"x")])
    (tmp_path / "test" / "nshards.txt").write_text("2")
    assert reopen(tmp_path).keys == ["0", "1/0"]


def test_folders_of_classes(tmp_path):
    for key, number, data in pictures():
        folder = tmp_path / "set" / "test" / NAMES[number].title()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(data)
    samples = reopen(tmp_path / "set")
    assert (samples.layout, len(samples)) == ("folders", 24)
    assert samples.classnames == ("Circle", "Cross", "Square", "Triangle")
    assert samples.keys[0] == "Circle/black-circle.jpg"
    assert len(reopen(tmp_path / "set" / "test")) == 24  # without a folder for the split
    with pytest.raises(NotFoundError, match="no split train"):
        reopen(tmp_path / "set", split="train")


def write_parquet(folder, rows, names=NAMES, shards=1, total=None, label=None):
    """As Hugging Face datasets lay them on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    size = -(-len(rows) // shards)
    for shard in range(shards):
        some = rows[shard * size : (shard + 1) * size]
        table = pa.table(
            {
                "image": pa.array([{"bytes": data, "path": f"{key}.jpg"} for key, _, data in some]),
                "label": pa.array([number if label is None else label(number) for _, number, _ in some]),
            }
        ).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"test-{shard:05d}-of-{total or shards:05d}.parquet", row_group_size=5)


def test_hugging_face_datasets_in_parquet(tmp_path):
    write_parquet(tmp_path / "data", pictures(), shards=3)
    samples = reopen(tmp_path)
    assert (samples.layout, samples.classnames) == ("parquet", NAMES)
    assert read(samples) == [data for *_, data in pictures()]
    assert samples.labels == [number for _, number, _ in pictures()]
    some = [fetch(row) for row in samples.rows.read([2, 3, 9, 23])]
    assert some == [pictures()[i][2] for i in (2, 3, 9, 23)]


def test_a_row_without_a_label_is_left_out_and_the_others_keep_their_pictures(tmp_path):
    write_parquet(tmp_path, pictures(), shards=2, label=lambda number: None if number == 1 else number)
    samples = reopen(tmp_path)
    assert samples.skipped == {"no_label": 6}
    assert read(samples) == [data for _, number, data in pictures() if number != 1]


def test_parquet_of_names_and_of_captions(tmp_path):
    write_parquet(tmp_path / "a", pictures(), names=(), label=lambda number: NAMES[number])
    assert reopen(tmp_path / "a").labels[:4] == list(NAMES)
    write_parquet(tmp_path / "b", pictures(), names=(), label=lambda number: ["one", f"two {number}"])
    assert reopen(tmp_path / "b", "captions").labels[1] == ("one", "two 1")
    with pytest.raises(DatasetError, match="no column 'img'; it has image, label"):
        reopen(tmp_path / "a", image="img")


def test_csv_of_paths_and_labels(tmp_path):
    rows = []
    for key, number, data in pictures():
        (tmp_path / f"{key}.jpg").write_bytes(data)
        rows.append({"file": f"{key}.jpg", "class": NAMES[number], "split": "test"})
    rows.append({"file": "other.jpg", "class": "circle", "split": "train"})
    with open(tmp_path / "labels.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["file", "class", "split"])
        writer.writeheader()
        writer.writerows(rows)
    samples = reopen(tmp_path, image="file", label="class")
    assert (samples.layout, samples.labels[:4]) == ("csv", list(NAMES))
    assert read(samples) == [data for *_, data in pictures()]
    assert len(reopen(tmp_path, image="file", label="class", split="train")) == 1
    captions = reopen(tmp_path / "labels.csv", "captions", image="file", label="class")
    assert captions.labels[0] == ("circle",)
    with pytest.raises(NotFoundError, match="no split val"):
        reopen(tmp_path, image="file", label="class", split="val")


def test_our_shards(tmp_path):
    samples = reopen(write_samples(tmp_path / "shards"))
    assert (samples.layout, len(samples)) == ("shards", 64)
    assert samples.labels[0] == "circle"
    captions = reopen(tmp_path / "shards", "captions")
    assert captions.labels[0] == ("a red circle",)


def test_frames_of_videos(tmp_path):
    for key, _, data in pictures():
        (tmp_path / f"{key}.jpg").write_bytes(data)
    frames = {
        "classes": list(NAMES),
        "labels": {"red-circle.jpg": [0], "red-cross.jpg": [3, 1]},
        "sets": {"red-circle.jpg": ["green-circle.jpg"], "red-cross.jpg": []},
    }
    (tmp_path / "frames.json").write_text(json.dumps(frames))
    samples = reopen(tmp_path, "frames")
    assert samples.labels == [(0,), (0,), (3, 1)]
    assert samples.sets["red-circle.jpg"] == ("green-circle.jpg",)
    del frames["labels"]["red-circle.jpg"]
    (tmp_path / "frames.json").write_text(json.dumps(frames))
    with pytest.raises(DatasetError, match=r"red-circle\.jpg has no label"):
        reopen(tmp_path, "frames")


def test_what_is_no_dataset_says_so(tmp_path):
    with pytest.raises(NotFoundError, match="no dataset of a known layout"):
        find_layout(tmp_path, "single")
    with pytest.raises(NotFoundError, match="no such dataset"):
        reopen(tmp_path / "nothing")


# --- damage ---


def test_a_missing_shard_is_named(tmp_path):
    write_shapes(tmp_path, shards=3)
    (tmp_path / "test" / "1.tar").unlink()
    with pytest.raises(DatasetError, match=r"lacks 1 of 3 shards: 1\.tar"):
        reopen(tmp_path)
    write_shapes(tmp_path, shards=3)
    (tmp_path / "test" / "nshards.txt").write_text("2")
    with pytest.raises(DatasetError, match=r"says 2 shards, but there is 2\.tar too"):
        reopen(tmp_path)
    (tmp_path / "test" / "nshards.txt").unlink()
    with pytest.raises(DatasetError, match=r"no nshards\.txt"):
        reopen(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_truncated_shard_is_named(tmp_path, share):
    write_shapes(tmp_path)
    tar = tmp_path / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[: int(tar.stat().st_size * share)])
    with pytest.raises(DatasetError, match=r"1\.tar is damaged at byte .*truncated"):
        reopen(tmp_path)


def test_a_missing_or_truncated_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path, pictures(), shards=2, total=3)
    with pytest.raises(DatasetError, match=r"lacks 1 of 3 files of test: test-00002-of-00003"):
        reopen(tmp_path)
    write_parquet(tmp_path / "b", pictures())
    file = tmp_path / "b" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="no whole Parquet file"):
        reopen(tmp_path / "b")


def test_a_truncated_shard_of_ours_is_named(tmp_path):
    write_samples(tmp_path)
    tar = sorted(tmp_path.glob("*.tar"))[0]
    for index in tmp_path.glob("*.arrow"):
        index.unlink()
    (tmp_path / "dataset.json").unlink()
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(DatasetError, match="truncated"):
        reopen(tmp_path)


@pytest.mark.parametrize("label", [b"-1", b"cirkle", b"", b"1.5", b"\xff", b"9" * 5000])
def test_labels_that_are_none_are_counted(tmp_path, label):
    samples = [(key, label if key == "red-cross" else str(number).encode(), data) for key, number, data in pictures()]
    opened = reopen(write_wds(tmp_path, samples))
    assert opened.skipped == {"bad_label": 1}
    assert len(opened) == 23


def test_a_label_behind_the_list_of_classes_means_that_the_list_is_another_one(tmp_path):
    samples = [(key, b"4" if key == "red-cross" else str(n).encode(), data) for key, n, data in pictures()]
    with pytest.raises(DatasetError, match=r"red-cross is of class 4, but classnames\.txt names 4 classes"):
        reopen(write_wds(tmp_path, samples))


@pytest.mark.parametrize("count", ["1000000000000", "9" * 5000])
def test_shards_without_end_are_not_listed(tmp_path, count):
    write_shapes(tmp_path)
    (tmp_path / "test/nshards.txt").write_text(count)
    with pytest.raises(DatasetError, match=r"nshards\.txt (announces|is no number)"):
        reopen(tmp_path)


@pytest.mark.parametrize("name", ["Test", "testing", "validation", "TRAIN"])
def test_folders_that_are_splits_are_no_classes(tmp_path, name):
    for folder in (name, "other"):
        (tmp_path / folder / "a").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=f"no split test; there is {name}: name it in .data. of a TOML"):
        reopen(tmp_path)


def test_one_class_folder_is_no_dataset(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/a.png").touch()
    with pytest.raises(DatasetError, match="one class folder, cats: nothing to tell apart"):
        reopen(tmp_path)


def test_what_programs_lay_beside_pictures_is_not_measured(tmp_path):
    for name in ("a", "b"):
        for file in ("x.png", ".ipynb_checkpoints/x-checkpoint.png", "._x.png", "Thumbs.db", "y.tif"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    (tmp_path / "__MACOSX/a").mkdir(parents=True)
    opened = reopen(tmp_path)
    assert opened.keys == ["a/x.png", "a/y.tif", "b/x.png", "b/y.tif"]
    assert opened.classnames == ("a", "b")
    assert opened.passed_over == {".db": 2}


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_a_table_may_part_its_columns_by_another_sign(tmp_path, delimiter):
    (tmp_path / "test.csv").write_text(f"image{delimiter} label\na.png{delimiter} cat\n../b.png{delimiter} dog\n")
    opened = reopen(tmp_path)
    assert (opened.keys, opened.labels) == (["a.png"], ["cat"])
    assert opened.skipped == {"outside_folder": 1}


@pytest.mark.parametrize(
    "content", ["[]", "[" * 100_000, '{"labels": 5, "sets": {}}', '{"labels": {}, "sets": {"a": 5}}', "\0", '"x"']
)
def test_frames_that_are_none_are_one_line(tmp_path, content):
    (tmp_path / "frames.json").write_text(content)
    with pytest.raises(DatasetError):
        reopen(tmp_path, "frames")


@pytest.mark.parametrize(
    "content", [b"a = " + b"[" * 100_000, b"\xff\xfe", b"a = 1" + b"0" * 5000, b"border = -20\n[data]\n"]
)
def test_a_toml_of_any_content_is_one_line(tmp_path, content):
    (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(UsageError):
        load_own(tmp_path / "own.toml")


def test_vectors_that_are_none_are_counted(tmp_path):
    bad = iter([b"", b"\x93NUMPY broken", npy([1, 0]), npy([2, 0, 0, 0]), npy([[1, 0, 0, 0]])])
    samples = [(key, next(bad, npy([1, 0, 0, 0])), data) for key, _, data in pictures()]
    assert reopen(write_wds(tmp_path, samples, "npy"), "multi").skipped == {"bad_label": 5}


def test_a_member_that_is_there_twice_is_named(tmp_path):
    write_shapes(tmp_path, shards=1)
    write_tar(tmp_path / "test" / "0.tar", [("a.cls", b"0"), ("a.jpg", b"x"), ("a.cls", b"1")])
    with pytest.raises(DatasetError, match=r"has a\.cls twice"):
        reopen(tmp_path)


# --- what others write ---


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (
            lambda number: None if number == 1 else float(number),
            lambda number: number,
        ),  # pandas, of a column with a gap
        (lambda number: Decimal(number), lambda number: number),
        (lambda number: number > 1, lambda number: int(number > 1)),
        (lambda number: NAMES[number].encode(), lambda number: NAMES[number]),
        (lambda number: math.nan if number == 1 else float(number), lambda number: number),
    ],
)
def test_labels_of_other_types_are_read(tmp_path, write, read):
    write_parquet(tmp_path, pictures(), names=(), label=write)
    opened = reopen(tmp_path)
    gaps = [number for _, number, _ in pictures() if write(number) is None or write(number) != write(number)]
    assert opened.labels == [read(number) for _, number, _ in pictures() if number not in gaps]
    assert opened.skipped == ({"no_label": 6} if gaps else {})


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (lambda number: number + 0.5, r"bad_label 24; a label is 0.5 .column 'label' of type double."),
        (lambda number: {"name": NAMES[number]}, r"a label is {'name': 'circle'} .column 'label' of type struct"),
        (lambda number: [number], r"a label is \[0\] .column 'label' of type list"),
        (lambda number: -1, r"a label is -1 .column 'label' of type int64."),
    ],
)
def test_labels_that_are_none_are_named_with_their_type(tmp_path, label, said):
    write_parquet(tmp_path, pictures(), names=(), label=label)
    with pytest.raises(DatasetError, match=said):
        reopen(tmp_path)


def test_names_in_label_files_are_the_classes_they_name(tmp_path):
    named = [(key, NAMES[number].encode(), data) for key, number, data in pictures()]
    assert expected(reopen(write_wds(tmp_path / "listed", named)))
    assert reopen(write_wds(tmp_path / "bare", named, classnames=None)).labels[:4] == list(NAMES)


def write_table(path, rows):
    with open(path, "w", newline="") as handle:
        csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)


@pytest.mark.parametrize(
    ("cells", "labels", "skipped"),
    [
        (["0.0", "1.0", "", "2.0"], [0, 1, 2], {"no_label": 1}),  # pandas, of a column with a gap
        (["0", "1", "NaN", "-1"], [0, 1], {"no_label": 1, "bad_label": 1}),
        (["747", "A380", "007", "DC-10"], ["747", "A380", "007", "DC-10"], {}),
        (["nan", "roti", "1.5", "x"], ["nan", "roti", "1.5", "x"], {}),
    ],
)
def test_a_column_is_of_numbers_or_of_names(tmp_path, cells, labels, skipped):
    write_table(tmp_path / "test.tsv", [["image", "label"], *([f"{i}.png", cell] for i, cell in enumerate(cells))])
    opened = reopen(tmp_path)
    assert (opened.labels, opened.skipped) == (labels, skipped)


def test_a_list_in_a_cell_is_several(tmp_path):
    cell = json.dumps(["a dog", "two | dogs"])
    rows = [["image", "captions"], ["a.png", cell], ["b.png", "[sic] a cat"], ["a.png", "late"], ["c.png", "[]"]]
    write_table(tmp_path / "test.csv", rows)
    opened = reopen(tmp_path, "captions")
    assert opened.labels == [("a dog", "two | dogs", "late"), ("[sic] a cat",)]
    assert opened.skipped == {"bad_label": 1}
    write_table(tmp_path / "test.csv", [["image", "label"], ["a.png", '["x", "y"]'], ["b.png", "z|x"], ["c.png", ""]])
    assert reopen(tmp_path, "multi").labels == [("x", "y"), ("z", "x"), ()]


def test_json_lines_are_read_as_if_they_were_a_csv(tmp_path):
    rows = [
        {"image": "a.png", "label": 1},
        {"label": None, "image": "b.png", "more": {}},
        {"image": "c.png", "label": "0"},
    ]
    (table := tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"label": 0}])) + "\n\n")
    opened = reopen(table)
    assert (opened.keys, opened.labels, opened.skipped) == (["a.png", "c.png"], [1, 0], {"no_label": 1, "no_image": 1})
    table.write_text(json.dumps({"image": "a.png", "captions": ["a dog", "x\u2028y"]}, ensure_ascii=False))
    assert reopen(table, "captions").labels == [("a dog", "x\u2028y")]
    table.write_text('{"image": "a.png", "label": 1}\n[1]')
    assert reopen(table).skipped == {"bad_row": 1}


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path):
    (tmp_path / "test.csv").write_text('image,label\na.png,cat\nb.png,"dog\nc.png,cat\nd.png,cat\n')
    assert reopen(tmp_path).labels == ["cat", '"dog', "cat", "cat"]
    (tmp_path / "test.csv").write_text('image,label\na.png,"A" class\n')
    assert reopen(tmp_path).labels == ["A class"]


@pytest.mark.parametrize(
    "rows",
    [
        'a.png,"cat\nb.png,dog\nc.png,cat"\n',
        '"a.png,cat\nb.png",dog\n',
    ],
)
def test_a_quote_that_is_closed_lines_later_does_not_swallow_them(tmp_path, rows):
    (tmp_path / "test.csv").write_text(f"image,label\n{rows}")
    with pytest.raises(DatasetError, match="swallow"):
        reopen(tmp_path)


def test_a_caption_with_commas_and_no_quotes_is_not_cut(tmp_path):
    (tmp_path / "test.csv").write_text("image,captions\na.png,a dog, running\nb.png,a cat\nc.png,a cow,,\n")
    opened = reopen(tmp_path, "captions")
    assert (opened.labels, opened.skipped) == ([("a cat",), ("a cow",)], {"bad_row": 1})


def test_a_picture_that_is_spelled_in_two_ways_is_one(tmp_path):
    write_table(tmp_path / "test.csv", [["image", "captions"], ["p/a.png", "one"], ["./p/b/../a.png", "two"]])
    assert reopen(tmp_path, "captions").labels == [("one", "two")]
    write_table(tmp_path / "test.csv", [["image", "label"], ["p/a.png", "x"], ["./p/a.png", "y"]])
    with pytest.raises(DatasetError, match="come more than once"):
        reopen(tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("test-00000-of-00001.parquet", "test-00000-of-00001-a1b2c3.parquet"),  # the hub's names of before and of now
        ("small/test-00000-of-00001.parquet", "large/test-00000-of-00001.parquet"),  # two configurations
        ("small/test/0000.parquet", "large/test/0000.parquet"),
        ("test.parquet", "test_backup.parquet"),
    ],
)
def test_tables_that_are_each_the_whole_split_are_not_taken_together(tmp_path, first, second):
    write_parquet(tmp_path / "made", pictures())
    made = next((tmp_path / "made").iterdir()).read_bytes()
    for name in (first, second):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(made)
    with pytest.raises(DatasetError, match="several tables of test"):
        reopen(tmp_path / "set")
    (tmp_path / "set" / second).unlink()
    assert len(reopen(tmp_path / "set")) == 24


def test_space_around_a_name_makes_no_other_class(tmp_path):
    labels = iter([f"{NAMES[number]}{' ' * (place % 2)}" for place, (_, number, _) in enumerate(pictures())])
    write_parquet(tmp_path, pictures(), names=(), label=lambda _: next(labels))
    assert set(reopen(tmp_path).labels) == set(NAMES)


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    write_table(tmp_path / "test.csv", [["image", "label"], ["a.png", "cat"], ["b.png", "cat"]])
    entry = Dataset(id="mine", title="mine", metric="acc1", profiles={OWN: Profile()})
    with pytest.raises(DatasetError, match="mine has one class, cat: nothing to tell apart"):
        index_labels(entry.resolve(OWN), reopen(tmp_path), Place())


def test_splits_are_found_by_what_they_are_called_and_else_named(tmp_path):
    for name in ("Training/a", "Training/b", "validation/a", "validation/b"):
        (tmp_path / "set" / name).mkdir(parents=True)
    assert guess_place(tmp_path / "set") == Place(train="Training", test="validation", val="none")
    write_table(tmp_path / "all.csv", [["image", "label", "split"], ["a.png", "x", "dev"], ["b.png", "x", "held out"]])
    with pytest.raises(NotFoundError, match="no split test; its column `split` has dev, held out"):
        reopen(tmp_path / "all.csv")


def test_keys_that_begin_anew_in_every_shard_of_ours_stay_apart(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("0.jpg", b"x"), ("0.txt", b"a"), ("0.json", b'{"label": "cat"}')])
    opened = reopen(tmp_path)
    assert (opened.layout, opened.keys, opened.labels) == ("shards", ["0", "1/0"], ["cat", "cat"])


def test_a_parquet_file_whose_pages_are_damaged_is_named(tmp_path):
    write_parquet(tmp_path, pictures())
    file = next(tmp_path.glob("*.parquet"))
    with pq.ParquetFile(file) as opened:
        at = opened.metadata.row_group(0).column(0).data_page_offset
    file.write_bytes(file.read_bytes()[:at] + b"\xff" * 64 + file.read_bytes()[at + 64 :])
    with pytest.raises(DatasetError, match="is damaged"):
        read(reopen(tmp_path))


# --- labels to classes ---


def numbered(tmp_path, names, text, **place):
    write_shapes(tmp_path / "shapes", names)
    entry = load_own(write_own(tmp_path / "mine.toml", text))
    samples = open_samples(entry.data, tmp_path, "test", entry.kind)
    return samples, index_labels(entry.resolve("paper"), samples, entry.data)


def test_a_source_in_another_order_gives_the_same_labels(tmp_path):
    text = "classes = ['cross', ['circle', 'disc'], 'triangle', 'box']\naliases = {square = 'box'}"
    samples, found = numbered(tmp_path, NAMES, text)
    for key, numbers in zip(samples.keys, found.numbers, strict=True):
        name = key.split("-")[1]
        assert found.names[numbers[0]][0] == {"square": "box"}.get(name, name)


def test_a_source_with_a_class_absent_or_another_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="4 classes, the registry 5; it lacks 'ring'"):
        numbered(tmp_path, NAMES, "classes = ['cross', 'circle', 'triangle', 'square', 'ring']")
    with pytest.raises(DatasetError, match="only the source has 'square'; it lacks 'ring'"):
        numbered(tmp_path, NAMES, "classes = ['cross', 'circle', 'triangle', 'ring']")


def test_numbers_without_names_need_a_word_on_their_order(tmp_path):
    write_shapes(tmp_path / "shapes", classnames=None)
    entry = load_own(write_own(tmp_path / "a.toml", "classes = ['circle', 'square', 'triangle', 'cross']"))
    samples = open_samples(entry.data, tmp_path, "test", "single")
    with pytest.raises(DatasetError, match='order = "registry"'):
        index_labels(entry.resolve("paper"), samples, entry.data)
    text = "classes = ['circle', 'square', 'triangle', 'cross']"
    entry = load_own(write_own(tmp_path / "b.toml", text, "path = 'shapes'\norder = 'registry'"))
    assert index_labels(entry.resolve("paper"), samples, entry.data).numbers[3] == (3,)
    entry = load_own(write_own(tmp_path / "c.toml", "classes = ['a', 'b']", "path = 'shapes'\norder = 'registry'"))
    with pytest.raises(DatasetError, match="2 is no number of one of 2 classes"):
        index_labels(entry.resolve("paper"), samples, entry.data)
    with pytest.raises(DatasetError, match="nothing says what they are called"):
        index_labels(load_own(write_own(tmp_path / "d.toml")).resolve("paper"), samples, Place())


def test_numbers_that_are_written_out_are_numbers_unless_classes_are_called_so(tmp_path):
    write_parquet(tmp_path / "shapes", pictures(), names=(), label=str)
    entry = load_own(
        write_own(tmp_path / "mine.toml", f"classes = {list(NAMES)}", "path = 'shapes'\norder = 'registry'")
    )
    samples = open_samples(entry.data, tmp_path, "test", entry.kind)
    assert samples.labels[:2] == ["0", "1"]
    found = index_labels(entry.resolve("paper"), samples, entry.data)
    assert [numbers[0] for numbers in found.numbers] == [number for _, number, _ in pictures()]
    entry = load_own(write_own(tmp_path / "digits.toml", 'classes = ["3", "2", "1", "0"]'))
    found = index_labels(entry.resolve("paper"), samples, entry.data)
    assert [numbers[0] for numbers in found.numbers] == [3 - number for _, number, _ in pictures()]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["n01440764", "n01443537"], "WordNet's numbers, such as 'n01440764'"),
        (["0", "1"], "numbers, such as '0'"),
        (["001.Black footed Albatross", "002.Laysan Albatross"], "numbered"),
        (["AnnualCrop", "Forest", "SeaLake"], "words written together, such as 'AnnualCrop'"),
        (["747-400", "DC-10", "MD-80", "F-16A/B", "McDonnell"], ""),
        (["annual crop", "iPhone", "USA"], ""),
    ],
)
def test_names_that_are_none_are_doubted(names, said):
    assert [said in warning for warning in doubt_names(names)] == [True] * bool(said)


def test_clip_benchmarks_profile_takes_what_lies_beside_the_pictures(tmp_path):
    names = ["eight", "three", "four", "five", "six", "seven", "nine", "ten"]
    entry = load_dataset_entry("clevr_counts")
    samples = Samples(tmp_path, "wds", ["a", "b"], [0, 2], classnames=tuple(names), templates=("{} things",))
    theirs = index_labels(entry.resolve("clip_benchmark"), samples, Place())
    assert (theirs.names[0], theirs.templates, theirs.numbers) == (("eight",), ("{} things",), ((0,), (2,)))
    ours = index_labels(entry.resolve("paper"), samples, Place())
    assert [ours.names[n[0]] for n in ours.numbers] == [("8",), ("4",)]
    assert ours.templates == ("a photo of {} objects.",)
    samples.classnames = (*names[:-1], "many")
    assert "only the source has 'many'" in index_labels(entry.resolve("clip_benchmark"), samples, Place()).warnings[0]


def test_labels_count_in_the_order_of_the_profile(tmp_path):
    """EuroSAT from class folders in CLIP_benchmark's profile, whose list begins elsewhere than the paper's."""
    samples = Samples(tmp_path, "folders", ["a", "b"], [0, 9], classnames=EUROSAT)
    entry = load_dataset_entry("eurosat")
    for profile, numbers in (("paper", ((7,), (5,))), ("clip_benchmark", ((0,), (9,)))):
        found = index_labels(entry.resolve(profile), samples, Place())
        assert found.numbers == numbers
        assert [found.names[n[0]] for n in found.numbers] == [("annual crop land",), ("lake or sea",)]


EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"),
    *("PermanentCrop", "Residential", "River", "SeaLake"),
)


# --- places ---


@contextlib.contextmanager
def serve(handler):
    """A server on loopback, which stops whatever happens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path):
    root = tmp_path / "served"
    write_shapes(root / "shapes")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with serve(partial(Quiet, directory=str(root))) as url:
        yield root, url


def test_a_folder_at_a_url_is_fetched_whole(server, tmp_path):
    root, url = server
    fetch_wds(f"{url}/shapes/", tmp_path / "got", "test")
    assert expected(reopen(tmp_path / "got"))
    (root / "shapes" / "test" / "1.tar").unlink()
    fetch_wds(f"{url}/shapes", tmp_path / "got", "test")  # it is there
    with pytest.raises(DownloadError, match=r"1\.tar: 404"):
        fetch_wds(f"{url}/shapes", tmp_path / "other", "test")
    assert not (tmp_path / "other" / "test" / "1.tar").exists()
    with pytest.raises(DownloadError, match="404"):
        fetch_wds(f"{url}/shapes", tmp_path / "other", "train")


def test_a_transfer_that_breaks_off_leaves_nothing_under_its_name(tmp_path):
    class Short(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            data = {"nshards.txt": b"1", "0.tar": b"half"}.get(name, b"")
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data) * (2 if name == "0.tar" else 1)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with serve(Short) as url, pytest.raises(DownloadError, match=r"0\.tar: 4 bytes came, 8 were announced"):
        fetch_wds(url, tmp_path / "got", "test")
    assert [path.name for path in (tmp_path / "got" / "test").iterdir()] == ["nshards.txt"]


def test_a_dataset_of_ones_own_may_lie_at_a_url(server, tmp_path):
    _, url = server
    layouts.save(make_loaded(TINY_VIT), tmp_path / "model", "diptych")
    suite = write_own(tmp_path / "mine.toml", data=f"path = '{url}/shapes'")
    config = EvaluateConfig(
        models=(str(tmp_path / "model"),), suite=(str(suite),), data=tmp_path / "data", out=tmp_path / "out"
    )
    with pytest.raises(NotFoundError, match=rf"mine: {url}/shapes"):
        run(config)
    (tmp_path / "data" / "mine" / "test").mkdir(parents=True)  # a transfer that broke off
    (tmp_path / "data" / "mine" / "test" / "nshards.txt").write_text("2")
    (result,) = run(replace(config, download=True)).results
    assert result.images == 24


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client speaks when it fetches files of a dataset."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/datasets/clip-benchmark/wds_mnist"):
            if "/tree/" in path:
                listed = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()]
                return self.answer(json.dumps(listed).encode(), body)
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "clip-benchmark/wds_mnist", "sha": "1" * 40, "siblings": siblings}
            return self.answer(json.dumps(info).encode(), body)
        name = path.partition("/resolve/" + "1" * 40 + "/")[2]
        if name not in self.files:
            return self.answer(b"", body, 404)
        return self.answer(self.files[name], body)

    def answer(self, data, body, status=200):
        self.send_response(status)
        for key, value in (("Content-Length", len(data)), ("ETag", f'"{len(data)}"'), ("X-Repo-Commit", "1" * 40)):
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_the_command_fetches_a_dataset_from_the_environments_hub(tmp_path):
    layouts.save(make_loaded(TINY_VIT), tmp_path / "model", "diptych")
    write_shapes(tmp_path / "source", classnames=[str(i) for i in range(10)])
    files = {p.relative_to(tmp_path / "source").as_posix(): p for p in (tmp_path / "source").rglob("*") if p.is_file()}
    Hub.files = {name: path.read_bytes() for name, path in files.items()} | {"train/0.tar": b"not wanted"}
    with serve(Hub) as url:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "diptych", "evaluate", "--model", str(tmp_path / "model"), "--suite", "mnist"]
        command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--download", "--json"]
        done = subprocess.run([*command, "--on-mismatch", "warn"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["dataset"], result["images"], result["profile"]) == ("mnist", 24, "paper")
    assert any("24 pictures, the profile paper says 10,000" in warning for warning in result["warnings"])
    assert not any(path.endswith("train/0.tar") for path in Hub.asked)


def test_datasets_are_found_by_id_and_by_repository(tmp_path):
    entry = load_dataset_entry("cifar100")
    assert locate(entry, tmp_path) is None
    write_shapes(tmp_path / "wds_vtab-cifar100")
    assert locate(entry, tmp_path) == (Place(), tmp_path / "wds_vtab-cifar100")
    write_parquet(tmp_path / "cifar100", pictures())
    place, root = locate(entry, tmp_path)
    assert (place.image, place.label, root) == ("img", "fine_label", tmp_path / "cifar100")
    for name in ("train", "val"):
        (tmp_path / "imagenet" / name / "n01440764").mkdir(parents=True)
    place, _ = locate(load_dataset_entry("imagenet"), tmp_path)
    assert place.test == "val"


def test_layouts_that_cannot_be_of_a_kind_say_so(tmp_path):
    (tmp_path / "a" / "x").mkdir(parents=True)
    with pytest.raises(UsageError, match="one label to each picture"):
        reopen(tmp_path / "a", "captions", layout="folders")


def test_a_mark_before_the_json_of_a_sample_is_no_part_of_it(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.txt", b"a"), ("0.json", b'\xef\xbb\xbf{"label": "cat"}')])
    assert reopen(tmp_path).labels == ["cat"]
