"""Indexes and descriptions that lie: changed behind our back, of another tar, or made to crash who reads them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diptych import files
from diptych.errors import DiptychError, ShardError
from diptych.pair import Pair
from diptych.shards import index as index_module
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.index import INDEX_SCHEMA, build_index, load_index, write_index
from diptych.shards.loader import MAX_OPEN_SHARDS, Loader
from diptych.shards.members import iter_members
from diptych.shards.write import write_shards
from diptych.tokenizer import Tokenizer
from samples import draw, encode, make_pairs, write_tar

JPEG = encode(draw("red", "circle"))


def foreign(path: Path, word: str = "thing", samples: int = 3) -> Path:
    pairs = [(f"{i}.jpg", JPEG, f"{i}.txt", f"a {word} number {i}".encode()) for i in range(samples)]
    return write_tar(path, [member for jpg, image, txt, text in pairs for member in ((jpg, image), (txt, text))])


def captions(shard: Path) -> list[str]:
    return load_index(shard).table["caption"].to_pylist()


def test_a_flipped_bit_never_crashes_and_never_changes_what_is_read(tmp_path):
    """In a process of its own, since a crash is one of the things that must not happen."""
    write_shards(make_pairs(8), tmp_path / "own")
    script = f"""
import random, sys
from pathlib import Path
from diptych.errors import ShardError
from diptych.shards.index import read_index
shard, path = Path({str(tmp_path)!r}, "own/00000.tar"), Path({str(tmp_path)!r}, "own/00000.arrow")
good, draws = path.read_bytes(), random.Random(0)
whole = read_index(shard, path, shard.stat().st_size)
refused = 0
for trial in range(600):
    data = bytearray(good)
    for _ in range(draws.choice((1, 1, 3))):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)
    try:
        found = read_index(shard, path, shard.stat().st_size)
    except ShardError:
        refused += 1
    else:
        assert found.table == whole.table and found.skipped == whole.skipped, trial
assert refused > 200, refused
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def forge(index, path: Path, table: pa.Table | None = None, **metadata: str) -> None:
    """Write an index as an older version did, without a checksum that would tell."""
    table = (index.table if table is None else table).replace_schema_metadata(
        {"version": "1", "skipped": json.dumps(index.skipped), **metadata}
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("skipped", ["{", "5", "[5]", '["ab", 7]', "[" * 100_000, '[["a"]]'])
def test_skipped_samples_that_are_no_list_of_pairs_are_refused(tmp_path, skipped):
    shard = foreign(tmp_path / "a.tar")
    forge(build_index(shard), tmp_path / "a.arrow", skipped=skipped)
    with pytest.raises(ShardError, match="not a shard index"):
        load_index(shard)


@pytest.mark.parametrize(("column", "value"), [("offset", -512), ("size", -1), ("size", 1 << 62), ("offset", 1 << 62)])
def test_a_picture_outside_of_the_tar_is_refused(tmp_path, column, value):
    shard = foreign(tmp_path / "a.tar")
    index = build_index(shard)
    rows = index.table.to_pylist()
    rows[1][column] = value
    forge(index, tmp_path / "a.arrow", pa.Table.from_pylist(rows, INDEX_SCHEMA))
    with pytest.raises(ShardError, match="shorter than its index"):
        load_index(shard)


def test_a_text_whose_place_is_out_of_bounds_is_refused(tmp_path):
    shard = foreign(tmp_path / "a.tar")
    forge(build_index(shard), tmp_path / "a.arrow")
    data, length = (tmp_path / "a.arrow").read_bytes(), len("a thing number 0")
    places = np.arange(0, 4 * length, length, dtype=np.int32).tobytes()
    assert data.count(places) == 1
    lies = np.array([0, 1 << 20, 1 << 21, 1 << 22], dtype=np.int32).tobytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(places, lies))
    with pytest.raises(ShardError, match="not a shard index"):
        load_index(shard)


def test_an_index_of_the_first_version_is_still_read(tmp_path):
    shard = foreign(tmp_path / "a.tar")
    forge(build_index(shard), tmp_path / "a.arrow")
    assert captions(shard) == [f"a thing number {i}" for i in range(3)]


def test_a_tar_that_was_replaced_behind_its_index_is_refused(tmp_path):
    shard = foreign(tmp_path / "a.tar")
    write_index(build_index(shard), tmp_path / "a.arrow")
    status = shard.stat()
    foreign(shard, "thong")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size and time, as some tools leave it
    assert shard.stat().st_size == status.st_size
    with pytest.raises(ShardError, match=r"not the tar that its index a\.arrow was made of"):
        load_index(shard)


def test_a_copied_folder_is_compared_once(tmp_path, monkeypatch):
    shard = foreign(tmp_path / "a.tar")
    write_index(build_index(shard), tmp_path / "a.arrow")
    (tmp_path / "copy").mkdir()
    for name in ("a.arrow", "a.tar"):  # in the order of names, so that the tar is the younger one
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    assert captions(tmp_path / "copy/a.tar") == captions(shard)
    monkeypatch.setattr(index_module, "_scan", lambda *_: pytest.fail("it was compared before"))
    load_index(tmp_path / "copy/a.tar")


def test_a_foreign_tar_that_was_replaced_is_indexed_anew_whatever_its_size_and_time_say(tmp_path):
    shard = foreign(tmp_path / "a.tar")
    status = shard.stat()
    assert captions(shard)[0] == "a thing number 0"
    foreign(shard, "thong")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert captions(shard)[0] == "a thong number 0"


def test_a_damaged_index_in_the_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    shard = foreign(tmp_path / "a.tar")
    load_index(shard)
    (cached,) = (tmp_path / "cache/index").iterdir()
    data = bytearray(cached.read_bytes())
    data[data.index(b"thing")] ^= 1
    cached.write_bytes(data)
    assert captions(shard) == [f"a thing number {i}" for i in range(3)]
    assert b"uhing" not in cached.read_bytes()


@pytest.mark.parametrize("place", ["file/cache", "/proc/nothing"])
def test_without_a_cache_that_can_be_written_the_index_is_made_and_one_line_says_so(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / place))
    with pytest.warns(UserWarning, match="set DIPTYCH_CACHE to a folder that can be written"):
        assert len(load_index(foreign(tmp_path / "a.tar"))) == 3


def test_a_user_without_a_home_needs_none(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DIPTYCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        assert len(load_index(foreign(tmp_path / "a.tar"))) == 3


# --- what a sample may be ---------------------------------------------------------------------------------------------


def reasons(shard: Path) -> list[str]:
    return [reason for _, reason in build_index(shard).skipped]


def test_files_that_macos_lays_beside_its_own_are_no_part_of_a_sample(tmp_path):
    kinds = [(prefix, *kind) for kind in (("jpg", JPEG), ("txt", b"x")) for prefix in ("._", "__MACOSX/._", "")]
    members = [(f"{prefix}{i}.{suffix}", content) for i in range(3) for prefix, suffix, content in kinds]
    assert len(build_index(write_tar(tmp_path / "a.tar", members))) == 3


def test_a_caption_of_gigabytes_that_is_all_holes_is_not_read(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        for name, size in (("a.jpg", len(JPEG)), ("a.txt", 60 << 30)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            if name == "a.jpg":
                file.write(JPEG + bytes(-len(JPEG) % 512))
        file.truncate(file.tell() + (60 << 30) + 1024)
    assert reasons(tmp_path / "a.tar") == ["text_too_large"]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", "\ufeffa cat".encode())])
    assert captions(shard) == ["a cat"]


def test_zeros_and_rubbish_are_walked_once(tmp_path):
    """Runs of zeros with rubbish between them, and a member at the end: each run looks for what follows it."""
    info = tarfile.TarInfo("a.jpg")
    info.size = len(JPEG)
    member = info.tobuf() + JPEG + bytes(-len(JPEG) % 512)
    (tmp_path / "a.tar").write_bytes((bytes(1024) + b"\1" * 512) * 20_000 + member)
    found = list(iter_members(tmp_path / "a.tar"))  # minutes, if it looked again each time
    assert sum(getattr(one, "name", "") == "a.jpg" for one in found) == 1


@pytest.mark.parametrize("digits", ["9" * 5000, "0" * 5000 + "65", "65"])
def test_a_caption_may_hold_a_number_of_any_length_as_an_entity(digits):
    ids = Tokenizer.clip()([f"a &#{digits}; b"])
    assert ids.shape[0] == 1
    if digits.endswith("65"):
        assert Tokenizer.clip().decode(ids[0].tolist()).endswith("a a b")


# --- what is written --------------------------------------------------------------------------------------------------


def test_keys_of_any_length_and_alphabet_are_written(tmp_path):
    keys = ["a" * 120, "字" * 44, "b" * 101, "é" * 60]
    report = write_shards([Pair(key=key, caption="c", image=JPEG) for key in keys], str(tmp_path / "shards"))
    assert (report.samples, report.dropped) == (4, {})
    assert load_index(tmp_path / "shards/00000.tar").table["key"].to_pylist() == keys


@pytest.mark.parametrize("where", ["key", "caption", "details"])
def test_half_a_surrogate_pair_is_dropped_and_counted(tmp_path, where):
    bad = {"key": "k", "caption": "c", "details": {}} | {where: {"a": "\ud800"} if where == "details" else "a\ud800"}
    report = write_shards([Pair(image=JPEG, **bad), Pair(key="good", caption="c", image=JPEG)], tmp_path)
    assert (report.samples, report.dropped) == (1, {"bad_text": 1})


# --- what describes a dataset -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [5, None, "", "../o.tar", "/etc/passwd", "a/b.tar", "a\\b.tar", "a\0.tar", ".hidden.tar", "a" * 300 + ".tar"],
)
def test_a_dataset_lists_files_of_its_own_folder_and_no_others(tmp_path, name):
    write_shards(make_pairs(2), tmp_path / "own")
    described = files.read_json(tmp_path / "own/dataset.json")
    described["shards"][0]["name"] = name
    files.write_json(tmp_path / "own/dataset.json", described)
    with pytest.raises(ShardError, match=r"dataset\.json is damaged"):
        load_dataset(tmp_path / "own")


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "null", '{"version": 1, "shards": 5, "hash": ""}', "\0" * 50])
@pytest.mark.parametrize("name", ["dataset.json", "tombstones.json"])
def test_a_description_of_any_content_is_refused_in_one_line(tmp_path, name, text):
    write_shards(make_pairs(2), tmp_path / "own")
    (tmp_path / "own" / name).write_text(text)
    with pytest.raises(ShardError, match="is damaged"):
        load_dataset(tmp_path / "own")


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"\x1f\x8b\x08\0rest", "a.tar", "compressed by gzip"),
        (b"<!DOCTYPE html><html>", "a.tar", "a web page"),
        (b"filepath\ttitle\na.jpg\ta cat\n", "pairs.csv", "a table"),
        (b"PAR1....PAR1", "pairs.parquet", "a table"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path, content, name, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=says):
        load_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["0.jpg", "1.jpg", "0.txt", "1.txt"], "--sort=name"),
        (["0 2.0 (clean).jpg", "0 2.0 (clean).txt"], "behind the first dot"),
        (["0.jpg", "1.jpg"], "caption is key.txt"),
    ],
)
def test_a_tar_without_a_sample_says_what_to_do(tmp_path, names, says):
    write_tar(tmp_path / "a.tar", [(name, JPEG if name.endswith("jpg") else b"words") for name in names])
    with pytest.raises(ShardError, match=says):
        load_dataset(tmp_path / "a.tar")


@pytest.mark.parametrize(("file", "says"), [("below/a.tar", "there are some in below"), ("a.tar.gz", "gunzip")])
def test_a_folder_without_tars_says_where_they_may_be(tmp_path, file, says):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(DiptychError, match=says):
        load_dataset(tmp_path)


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    import resource

    count = MAX_OPEN_SHARDS + 20
    for number in range(count):
        foreign(tmp_path / f"{number:05d}.tar", samples=1)
    config = LoaderConfig(batch_size=count, workers=0)
    loader = Loader([SourceConfig(path=tmp_path)], config, 32, Tokenizer.clip())
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + MAX_OPEN_SHARDS + 8, hard))
    try:
        batch = loader.read_batch(loader.position)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(batch.keys) == count
    assert not batch.skipped
