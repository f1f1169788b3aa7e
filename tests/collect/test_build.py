import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.collect.config import BuildConfig, ReadConfig
from diptych.collect.inputs import open_sources
from diptych.collect.run import run
from diptych.decode import decode
from diptych.errors import NotFoundError, UsageError
from diptych.shards.dataset import load_dataset
from diptych.shards.tombstones import write_tombstones
from diptych.stage.run import Engine
from samples import COLOURS, draw, encode, make_pairs, noise, write_samples, write_tar

FIXTURES = Path(__file__).parents[1] / "fixtures"
PICTURES = {f"{colour}.jpg": encode(draw(colour, "dot")) for colour in COLOURS}
RED, BLUE = PICTURES["red.jpg"], PICTURES["blue.jpg"]


def write_pictures(folder: Path, *names: str) -> Path:
    for name, data in ({name: PICTURES[Path(name).name] for name in names} or PICTURES).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def build(out: Path, *given: object, per_shard: int = 3, redo: bool = False, processes: int = 0, **read):
    config = BuildConfig(sources=tuple(map(str, given)), out=out, read=ReadConfig(**read), samples_per_shard=per_shard)
    sources = open_sources(config.sources, config.read, config.samples_per_shard)
    report = run(config, sources, engine=Engine(processes=processes, redo=redo))
    return report, sources


def read_back(out: Path) -> dict[str, tuple[bytes, list[str]]]:
    """Caption -> picture and all captions."""
    return {pair.caption: (pair.image, pair.details["captions"]) for pair in load_dataset(out).pairs}


ALL = {colour: (PICTURES[f"{colour}.jpg"], [colour]) for colour in COLOURS}


# --- tables ---


@pytest.mark.parametrize(("separator", "name"), [(",", "pairs.csv"), ("\t", "pairs.tsv"), (";", "pairs")])
def test_csv_of_paths_and_captions(tmp_path, separator, name):
    write_pictures(tmp_path / "pictures")
    rows = [f"pictures/{colour}.jpg{separator}{colour}{separator}{i}" for i, colour in enumerate(COLOURS)]
    header = separator.join(["filepath", "title", "label"])
    (tmp_path / name).write_text("\ufeff" + "\n".join([header, *rows]), "utf-8")
    report, (source,) = build(tmp_path / "out", tmp_path / name)
    assert source.said.endswith("8 samples; pictures: filepath, captions: title")
    assert (report.stage.rows, report.stage.kept, len(report.dataset.shards)) == (8, 8, 3)
    assert read_back(tmp_path / "out") == ALL
    first = next(iter(load_dataset(tmp_path / "out").pairs))
    assert (first.key, first.details["filepath"], first.details["label"]) == ("00000-00000", "pictures/red.jpg", "0")


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    write_pictures(tmp_path / "in", "red.jpg")
    write_pictures(tmp_path, "blue.jpg")
    (tmp_path / "in/page.jpg").write_text("<html>")
    lines = [
        b"red.jpg,fine", b"none.jpg,missing", b"../blue.jpg,outside", b"https://host/a.jpg,address", b"red.jpg,  ",
        b"page.jpg,web page", b"red.jpg", b"red.jpg,caf\xe9", b",nothing", b"red.jpg,again",
    ]  # fmt: skip
    (tmp_path / "in/t.csv").write_bytes(b"\n".join([b"image,caption", *lines]))
    report, _ = build(tmp_path / "out", tmp_path / "in/t.csv", image_column="image")
    expected = {"missing": 1, "outside_folder": 1, "url": 1, "empty_caption": 1, "not_a_picture": 1, "bad_row": 1}
    expected |= {"bad_text": 1, "no_image": 1}
    assert report.stage.dropped == dict(sorted(expected.items()))
    assert report.stage.rows == report.stage.kept + sum(expected.values()) == 10
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {"source": str(tmp_path / "in/t.csv"), "id": "none.jpg", "reason": "missing"} in skipped
    assert len(skipped) == 8


def test_a_picture_that_was_missing_is_tried_again(tmp_path):
    write_pictures(tmp_path, "red.jpg")
    (tmp_path / "t.csv").write_text("image,caption\nred.jpg,red\nblue.jpg,blue\n")
    assert build(tmp_path / "out", tmp_path / "t.csv")[0].stage.dropped == {"missing": 1}
    write_pictures(tmp_path, "blue.jpg")
    report, _ = build(tmp_path / "out", tmp_path / "t.csv")
    assert (report.stage.kept, report.stage.done) == (2, 1)
    assert build(tmp_path / "out", tmp_path / "t.csv")[0].stage.done == 0


def test_lines_of_the_same_picture_are_its_captions(tmp_path):
    write_pictures(tmp_path)
    rows = [f"{colour}.jpg,{text}" for colour in COLOURS for text in (colour, f"{colour} dot", f"{colour} dot", "dot")]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    report, _ = build(tmp_path / "out", tmp_path / "t.csv", per_shard=3)
    assert report.captions == 3
    expected = {colour: (PICTURES[f"{colour}.jpg"], [colour, f"{colour} dot", "dot"]) for colour in COLOURS}
    assert read_back(tmp_path / "out") == expected


def test_columns_are_guessed_only_where_there_is_one_choice(tmp_path):
    write_pictures(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text("a,b,caption,text\nred.jpg,blue.jpg,red,blue\n")
    with pytest.raises(UsageError, match=r"a, b may hold the pictures; say which by --image-column"):
        build(tmp_path / "out", table)
    with pytest.raises(UsageError, match=r"caption, text may hold the captions; say which by --caption-column"):
        build(tmp_path / "out", table, image_column="a")
    with pytest.raises(UsageError, match="no column 'c'; it has a, b, caption, text"):
        build(tmp_path / "out", table, image_column="c")
    build(tmp_path / "out", table, image_column="b", caption_column=("text", "caption"))
    assert read_back(tmp_path / "out") == {"blue": (BLUE, ["blue", "red"])}
    table.write_text("a,caption_1,caption_2\nred.jpg,red,rot\n")
    build(tmp_path / "other", table)
    assert read_back(tmp_path / "other") == {"red": (RED, ["red", "rot"])}
    table.write_text("url,text\nhttps://host/a.jpg,red\n")
    with pytest.raises(UsageError, match="addresses in url and no pictures; `diptych curate links"):
        build(tmp_path / "links", table)


def test_paths_are_those_of_the_table_the_named_folder_or_where_one_is(tmp_path, monkeypatch):
    write_pictures(tmp_path / "far/pictures", "red.jpg")
    (tmp_path / "t.csv").write_text("image,caption\npictures/red.jpg,red\n")
    with pytest.raises(UsageError, match=r"no pair was left to write .* missing 1"):
        build(tmp_path / "none", tmp_path / "t.csv")
    build(tmp_path / "named", tmp_path / "t.csv", images=tmp_path / "far")
    monkeypatch.chdir(tmp_path / "far")
    build(tmp_path / "here", "../t.csv")
    assert read_back(tmp_path / "named") == read_back(tmp_path / "here") == {"red": (RED, ["red"])}


def test_lines_of_json_with_lists_numbers_and_nulls(tmp_path):
    write_pictures(tmp_path)
    lines = [
        {"file_name": "red.jpg", "captions": ["red", None, "rot"], "width": 40, "tags": ["a", {"b": 1.5}]},
        {"file_name": "blue.jpg", "captions": None},
        {"file_name": None, "captions": ["x"]},
        {"captions": ["x"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report, _ = build(tmp_path / "out", tmp_path)
    assert report.stage.dropped == {"no_caption": 1, "null": 2}
    (pair,) = load_dataset(tmp_path / "out").pairs
    assert pair.details == {
        "caption": "red", "captions": ["red", "rot"], "width": 40, "tags": ["a", {"b": 1.5}], "file_name": "red.jpg"
    }  # fmt: skip


# --- JSON ---


@pytest.mark.parametrize("shape", ["map", "map of lists", "list"])
def test_captions_json(tmp_path, shape):
    write_pictures(tmp_path)
    content: object = {f"{colour}.jpg": colour for colour in COLOURS}
    if shape == "map of lists":
        content = {f"{colour}.jpg": [colour] for colour in COLOURS}
    if shape == "list":
        content = [{"image": f"{colour}.jpg", "caption": colour} for colour in COLOURS]
    (tmp_path / "captions.json").write_text(json.dumps(content, indent=1))
    build(tmp_path / "out", tmp_path)
    assert read_back(tmp_path / "out") == ALL


def write_coco(path: Path) -> Path:
    images = [{"id": 7 * i, "file_name": f"{c}.jpg", "height": 40, "license": 3} for i, c in enumerate(COLOURS)]
    texts = [
        {"id": 100 * i + j, "image_id": 7 * i, "caption": text.format(colour)}
        for j, text in enumerate(("{}", "a {} dot"))
        for i, colour in enumerate(COLOURS)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": texts}))
    return path


def test_cocos_annotations_have_all_captions_and_find_their_pictures(tmp_path):
    write_pictures(tmp_path / "train2017")
    annotations = write_coco(tmp_path / "annotations/captions_train2017.json")
    report, (source,) = build(tmp_path / "out", annotations)
    assert "COCO" in source.said
    assert report.captions == 2
    expected = {colour: (PICTURES[f"{colour}.jpg"], [colour, f"a {colour} dot"]) for colour in COLOURS}
    assert read_back(tmp_path / "out") == expected
    second = list(load_dataset(tmp_path / "out").pairs)[1]
    assert (second.details["image_id"], second.details["height"], second.details["file_name"]) == (7, 40, "green.jpg")
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"red.jpg, \.\.\.\) are not beside it; name their folder by --images"):
        build(tmp_path / "none", annotations)
    build(tmp_path / "named", annotations, images=tmp_path / "elsewhere")
    assert read_back(tmp_path / "named") == expected


def test_annotations_without_captions_say_which_have_them(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}))
    with pytest.raises(UsageError, match=r"annotations without captions; COCO's are in captions_train2017\.json"):
        build(tmp_path / "out", tmp_path / "instances.json")


def test_a_label_that_is_the_caption_stays_and_nonsense_costs_only_itself(tmp_path):
    write_pictures(tmp_path)
    deep = json.loads("[" * 60 + "]" * 60)
    records = [
        {"image": "red.jpg", "caption": "red", "label": "red", "deep": deep},
        {"image": ["blue.jpg"], "caption": "blue"},
        {"image": {"path": 7}, "caption": "blue"},
        {"image": "blue.jpg", "caption": {"a": 1}},
        {"image": "gray\0.jpg", "caption": "x"},
        "no object",
    ]
    lines = "\n".join(map(json.dumps, records))
    for name, text in (("list.json", json.dumps(records)), ("lines.jsonl", lines)):
        (tmp_path / name).write_text(text)
        report, _ = build(tmp_path / f"{name}-out", tmp_path / name, image_column="image")
        (pair,) = load_dataset(tmp_path / f"{name}-out").pairs
        assert (pair.caption, pair.details["label"]) == ("red", "red")
        assert report.stage.dropped["no_caption"] == 1
        assert report.stage.rows == 5 + (name == "lines.jsonl")


# --- folders ---


def test_a_folder_of_pictures_with_a_txt_beside_each(tmp_path):
    write_pictures(tmp_path / "in", "red.jpg", "a/blue.jpg", "a/b/green.jpg", "a/gray.jpg", "a/b/black.jpg")
    texts = {"red": b"\xef\xbb\xbfred\n", "a/blue": b" blue\nsecond line\n", "a/b/green": b"caf\xe9", "a/gray": b"\n"}
    for name, text in texts.items():
        (tmp_path / "in" / f"{name}.txt").write_bytes(text)
    (tmp_path / "in/readme.md").write_text("no caption")
    report, _ = build(tmp_path / "out", tmp_path / "in")
    assert report.stage.dropped == {"bad_text": 1, "empty_caption": 1, "no_caption": 1}
    assert read_back(tmp_path / "out") == {
        "red": (RED, ["red"]), "blue\nsecond line": (BLUE, ["blue\nsecond line"])
    }  # fmt: skip
    build(tmp_path / "lines", tmp_path / "in", lines=True)
    assert read_back(tmp_path / "lines") == {"red": (RED, ["red"]), "blue": (BLUE, ["blue", "second line"])}


def test_folders_without_pairs_say_what_they_hold(tmp_path):
    write_pictures(tmp_path / "in")
    (tmp_path / "in/notes.md").write_text("x")
    with pytest.raises(UsageError, match=r"no pairs in .*8 pictures, other files: \.md 1.*x.txt beside x.jpg"):
        build(tmp_path / "out", tmp_path / "in")
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_text("image,caption\nred.jpg,red\n")
    with pytest.raises(UsageError, match=r"has a\.csv, b\.csv; name the one that holds the pairs"):
        build(tmp_path / "out", tmp_path / "in")
    with pytest.raises(NotFoundError, match="no such source"):
        build(tmp_path / "out", tmp_path / "none.csv")


def test_lists_below_a_folder_are_those_of_its_splits(tmp_path):
    for split, names in (("train", ["red.jpg", "blue.jpg"]), ("test", ["gray.jpg"])):
        write_pictures(tmp_path / split, *names)
        rows = [f"{name},{name[:-4]}" for name in names]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    build(tmp_path / "out", tmp_path)
    assert read_back(tmp_path / "out").keys() == {"red", "blue"}
    build(tmp_path / "test-out", tmp_path, split="test")
    assert read_back(tmp_path / "test-out").keys() == {"gray"}


# --- Parquet and Arrow ---


def test_parquet_of_bytes_paths_structs_categories_and_large_texts(tmp_path):
    write_pictures(tmp_path)
    names, captions = list(PICTURES), [name[:-4] for name in PICTURES]
    structs = [{"bytes": data if i % 2 else None, "path": name} for i, (name, data) in enumerate(PICTURES.items())]
    kinds = {
        "bytes": pa.array(list(PICTURES.values()), pa.large_binary()),
        "paths": pa.array(names).dictionary_encode(),
        "struct": pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    }
    for kind, image in kinds.items():
        table = {"image": image, "caption": pa.array(captions, pa.large_string()), "score": [i / 4 for i in range(8)]}
        pq.write_table(pa.table(table), tmp_path / f"{kind}.parquet", row_group_size=2)
        build(tmp_path / kind, tmp_path / f"{kind}.parquet", per_shard=3)
        assert read_back(tmp_path / kind) == ALL
        pairs = list(load_dataset(tmp_path / kind).pairs)
        assert [pair.details["score"] for pair in pairs] == [i / 4 for i in range(8)]
        assert len(load_dataset(tmp_path / kind).shards) == 4  # 4 row groups and 1 shard more of each second


def test_nulls_several_captions_and_what_json_has_no_word_for(tmp_path):
    table = {
        "jpg": [RED, None, BLUE, b"no picture"],
        "caption": pa.array(["red", "none", None, "x"]).dictionary_encode(),
        "caption_2": ["rot", "nichts", None, "y"],
        "score": [float("nan"), 1.0, 1.0, 1.0],
        "thumbnail": [b"\xff\xd8\xff", None, None, None],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    report, _ = build(tmp_path / "out", tmp_path / "t.parquet", image_column="jpg")
    assert report.stage.dropped == {"no_caption": 1, "not_a_picture": 1, "null": 1}
    (pair,) = load_dataset(tmp_path / "out").pairs
    assert pair.details == {"caption": "red", "captions": ["red", "rot"]}


def test_parquet_files_of_a_hub_are_those_of_one_split(tmp_path):
    for split, colours in (("train", ("red", "blue")), ("test", ("gray",))):
        for i, colour in enumerate(colours):
            path = tmp_path / f"in/data/{split}-{i:05d}-of-{len(colours):05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = [{"bytes": PICTURES[f"{colour}.jpg"], "path": None}]
            pq.write_table(pa.table({"image": image, "text": [[colour, "dot"]]}), path)
    build(tmp_path / "out", tmp_path / "in")
    assert read_back(tmp_path / "out") == {"red": (RED, ["red", "dot"]), "blue": (BLUE, ["blue", "dot"])}
    with pytest.raises(UsageError, match="has the splits test, train; name one by --split"):
        build(tmp_path / "val", tmp_path / "in", split="val")


@pytest.mark.parametrize("format", ["stream", "file"])
def test_datasets_that_were_saved_to_disk(tmp_path, format):
    """What `datasets` 4 leaves: Arrow streams named by state.json; a folder for each split."""
    image = [{"bytes": data, "path": None} for data in PICTURES.values()]
    table = pa.table({"image": image, "text": [name[:-4] for name in PICTURES]})
    for split, part in (("train", table), ("test", table.slice(0, 1))):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        make = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
        with make(folder / "data-00000-of-00001.arrow", part.schema) as writer:
            writer.write_table(part, max_chunksize=3)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0"}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    build(tmp_path / "out", tmp_path / "in")
    assert read_back(tmp_path / "out") == ALL
    build(tmp_path / "one", tmp_path / "in/test")
    assert read_back(tmp_path / "one").keys() == {"red"}


def test_what_datasets_really_leaves_is_read(tmp_path):
    """Three pictures with lists of captions, one of them empty, saved by `save_to_disk` of datasets 5.2.0."""
    report, (source,) = build(tmp_path / "out", FIXTURES / "saved_by_datasets")
    assert source.said == "Arrow file; pictures: image, captions: caption"
    assert report.stage.dropped == {"no_caption": 1}
    pairs = list(load_dataset(tmp_path / "out").pairs)
    assert [pair.details["captions"] for pair in pairs] == [["x", "y"], ["z"]]
    assert [(pair.details["image"], pair.details["label"]) for pair in pairs] == [("red.jpg", 0), ("green.jpg", 1)]
    assert all(decode(pair.image).size == (40, 40) for pair in pairs)


# --- tars ---


def write_compressed(tar: Path, kind: str) -> Path:
    path = tar.with_name(f"{tar.name}.{kind}")
    data = tar.read_bytes()
    packed = gzip.compress(data) if kind == "gz" else pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(packed)
    tar.unlink()
    return path


@pytest.mark.parametrize("kind", ["plain", "gz", "zst"])
def test_tars_with_captions_in_the_json(tmp_path, kind):
    members = []
    for colour in COLOURS:
        details = {"text": [colour, f"{colour} dot"], "width": 40}
        members += [(f"d/{colour}.jpg", PICTURES[f"{colour}.jpg"]), (f"d/{colour}.json", json.dumps(details).encode())]
    tar = write_tar(tmp_path / "00000.tar", [*members, ("lost.jpg", RED)])
    tar = tar if kind == "plain" else write_compressed(tar, kind)
    report, (source,) = build(tmp_path / "out", tar, caption_key="text")
    assert report.stage.dropped == {"no_caption": 1}
    expected = {colour: (PICTURES[f"{colour}.jpg"], [colour, f"{colour} dot"]) for colour in COLOURS}
    assert read_back(tmp_path / "out") == expected
    assert next(load_dataset(tmp_path / "out").pairs).details["key"] == "d/red"
    if kind == "plain":  # there is one choice
        (guessed,) = open_sources([str(tar)], ReadConfig(), 3)
        assert guessed.said == source.said == "tar; captions: text in the JSON"


def test_a_compressed_tar_that_breaks_off_keeps_its_whole_samples(tmp_path):
    pictures = [encode(noise(seed=i)) for i in range(40)]
    members = [(f"{i}.{end}", content) for i in range(40) for end, content in (("jpg", pictures[i]), ("txt", b"red"))]
    data = gzip.compress(write_tar(tmp_path / "a.tar", members).read_bytes(), mtime=0)
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) * 2 // 3])
    report, _ = build(tmp_path / "out", tmp_path / "a.tar.gz", per_shard=100)
    assert 10 < report.stage.kept < 40
    assert report.stage.dropped["truncated"] == 1


def test_ranges_and_globs_of_tars_and_our_own_shards(tmp_path):
    write_samples(tmp_path / "own", 30, samples_per_shard=10)
    first = next(load_dataset(tmp_path / "own").pairs)
    write_tombstones(tmp_path / "own", [first.key])
    build(tmp_path / "range", f"{tmp_path}/own/{{00000..00001}}.tar", per_shard=100)
    assert len(load_dataset(tmp_path / "range")) == 19
    report, _ = build(tmp_path / "folder", tmp_path / "own", per_shard=7)
    assert report.stage.dropped == {"deleted": 1}
    pairs = {pair.details["key"]: pair for pair in load_dataset(tmp_path / "folder").pairs}
    assert pairs.keys() == {pair.key for pair in make_pairs(30)} - {first.key}
    assert all(pairs[pair.key].image == pair.image for pair in make_pairs(30) if pair.key != first.key)
    assert {pair.details["label"] for pair in pairs.values()} == {pair.details["label"] for pair in make_pairs(30)}
    assert len(open_sources([f"{tmp_path}/own/*.tar"], ReadConfig(), 3)) == 3
    with pytest.raises(UsageError, match="is named more than once"):
        open_sources([f"{tmp_path}/own/*.tar", f"{tmp_path}/own/00000.tar"], ReadConfig(), 3)


# --- as a stage ---


def test_several_processes_leave_the_same_bytes_as_one(tmp_path):
    write_pictures(tmp_path)
    rows = [f"{colour}.jpg,{colour} {i}" for i in range(5) for colour in COLOURS]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows, "none.jpg,none"]))
    for name, processes in (("one", 0), ("two", 2)):
        build(tmp_path / name, tmp_path / "t.csv", per_shard=8, processes=processes)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".tar"]) == 5
    for file in files:
        if file.name != ".lock":
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_folder_of_other_sources_or_of_something_else_is_refused(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "t.csv").write_text("image,caption\nred.jpg,red\n")
    build(tmp_path / "out", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("image,caption\nblue.jpg,blue\n")
    with pytest.raises(UsageError, match=r"was begun with other settings: .*name a new folder as --out, or add --redo"):
        build(tmp_path / "out", tmp_path / "t.csv")
    build(tmp_path / "out", tmp_path / "t.csv", redo=True)
    assert read_back(tmp_path / "out").keys() == {"blue"}
    with pytest.raises(UsageError, match="is not empty and was not begun by"):
        build(tmp_path, tmp_path / "t.csv")


def test_a_killed_build_goes_on(tmp_path):
    write_pictures(tmp_path)
    rows = [f"{COLOURS[i % 8]}.jpg,text {i}" for i in range(600)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    command = [sys.executable, "-m", "diptych", "shards", "build", str(tmp_path / "t.csv"), "--out"]
    arguments = ["--samples-per-shard", "20", "--processes", "1"]
    process = subprocess.Popen([*command, str(tmp_path / "out"), *arguments], stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "out/done").glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((tmp_path / "out/done").glob("*.json")))
    assert 3 <= done < 30
    report, _ = build(tmp_path / "out", tmp_path / "t.csv", per_shard=20)
    assert report.stage.found >= done - 1
    assert report.stage.found + report.stage.done == 30
    straight, _ = build(tmp_path / "straight", tmp_path / "t.csv", per_shard=20)
    assert report.dataset.content_hash == straight.dataset.content_hash


@pytest.mark.slow
def test_a_hundred_thousand_rows_of_csv_are_built_in_bounded_memory(tmp_path):
    write_pictures(tmp_path)
    lines = ["image,caption", *(f"{COLOURS[i % 8]}.jpg,a picture with number {i}" for i in range(100_000))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    script = (
        "import resource, sys; from diptych.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally:\n"  # a process's ru_maxrss begins with that of the one it was forked from: this test's
        "    own = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "    print('peak', own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    arguments = ["shards", "build", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--processes", "2"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert "100,000 samples of 100,000 in 100 shards" in done.stdout, done.stderr
    assert len(load_dataset(tmp_path / "out")) == 100_000
    peaks = [int(word) for word in done.stdout.splitlines()[-1].split()[1:]]
    assert max(peaks) < 200_000  # kB, of which Python with pyarrow takes half
