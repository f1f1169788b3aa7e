import json
import tarfile
import tracemalloc
from dataclasses import replace

import pytest

from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.pair import Pair
from diptych.shards import index as index_module
from diptych.shards.dataset import load_dataset
from diptych.shards.index import build_index, load_index
from diptych.shards.write import write_shards
from samples import encode, make_pairs, noise, write_samples, write_tar

JPEG = encode(noise())


def test_what_is_written_is_read_back(tmp_path):
    pairs = make_pairs(50)
    report = write_shards(pairs, tmp_path / "data", samples_per_shard=20)
    dataset = load_dataset(tmp_path / "data")
    assert (report.samples, report.shards, report.dropped) == (50, 3, {})
    assert report.dataset_hash == dataset.content_hash
    assert dataset.sizes.tolist() == [20, 20, 10]
    read = list(dataset.pairs)
    assert [(p.key, p.caption, p.image) for p in read] == [(p.key, p.caption, p.image) for p in pairs]
    assert read[0].details["source"] == "drawn"


def test_the_same_pairs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_samples(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_numbers_and_lists_of_details_are_numbers_and_lists(tmp_path):
    details = {"width": 800, "captions": ["a red dot", "ein roter Punkt"], "draw": 0.25, "label": None}
    bad = [{"number": float("nan")}, {"object": object()}, {"half": "\ud83d"}]
    pairs = [Pair(key=str(i), caption="a red dot", image=JPEG, details=one) for i, one in enumerate([details, *bad])]
    report = write_shards(pairs, tmp_path / "data")
    assert report.dropped == {"bad_details": 2, "bad_text": 1}
    (pair,) = load_dataset(tmp_path / "data").pairs
    assert pair.details == {"caption": "a red dot", **details}
    write_shards([replace(pair, caption="another")], tmp_path / "changed")
    assert next(load_dataset(tmp_path / "changed").pairs).details["caption"] == "another"


def test_pictures_do_not_wait_in_memory(tmp_path):
    def make():
        for i in range(40):
            yield Pair(key=str(i), caption="large", image=JPEG + bytes(1 << 20))

    tracemalloc.start()
    write_shards(make(), tmp_path / "data")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_shards_are_plain_tars_with_neighbouring_members(tmp_path):
    write_samples(tmp_path / "data", count=2)
    with tarfile.open(tmp_path / "data/00000.tar") as tar:
        assert tar.getnames() == [
            f"{key}.{end}" for key in ("red-circle", "red-square") for end in ("jpg", "txt", "json")
        ]
        assert tar.extractfile("red-circle.txt").read() == b"a red circle"


def test_pairs_that_cannot_be_used_are_dropped_and_counted(tmp_path):
    good = make_pairs(1)[0]
    bad = [
        good,
        Pair(key="a.b", caption="x", image=JPEG),
        Pair(key="a/b", caption="x", image=JPEG),
        Pair(key="c", caption="  ", image=JPEG),
        Pair(key="d", caption="x", image=b""),
        Pair(key="e", caption="x"),
        Pair(key="f", caption="x", image=b"text"),
    ]
    report = write_shards([good, *bad], tmp_path / "data")
    assert report.samples == 1
    assert report.dropped == {
        "duplicate_key": 1, "bad_key": 2, "empty_caption": 1, "empty_image": 2, "not_a_picture": 1
    }  # fmt: skip


def test_a_folder_that_holds_a_dataset_is_not_written_over(tmp_path):
    write_samples(tmp_path / "data")
    with pytest.raises(UsageError, match="already holds a dataset"):
        write_samples(tmp_path / "data")


def test_no_pair_at_all_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="no pair was left"):
        write_shards([], tmp_path / "data")


def foreign(tmp_path):
    return write_tar(
        tmp_path / "foreign.tar",
        [
            ("good.jpg", JPEG), ("good.txt", b" a cat \n"), ("good.json", b'{"n": 1}'),
            ("sub/json-only.png", JPEG), ("sub/json-only.json", b'{"caption": "a dog"}'),
            ("no-caption.jpg", JPEG),
            ("no-image.txt", b"words"),
            ("empty-image.jpg", b""), ("empty-image.txt", b"words"),
            ("empty-caption.jpg", JPEG), ("empty-caption.txt", b" \n"),
            ("bad-text.jpg", JPEG), ("bad-text.txt", b"\xff\xfe\xff"),
            ("bad-json.jpg", JPEG), ("bad-json.json", b"{"),
            ("good.jpg", JPEG), ("good.txt", b"again"),
            ("odd.0.jpg", JPEG), ("odd.txt", b"words"),
        ],
    )  # fmt: skip


def test_a_foreign_tar_is_indexed_with_every_skip_named(tmp_path):
    index = build_index(foreign(tmp_path))
    assert index.table.column("key").to_pylist() == ["good", "sub/json-only"]
    assert index.table.column("caption").to_pylist() == ["a cat", "a dog"]
    assert dict(index.skipped) == {
        "no-caption": "no_caption", "no-image": "no_image", "empty-image": "empty_image",
        "empty-caption": "empty_caption", "bad-text": "bad_text", "bad-json": "bad_text",
        "good": "duplicate_key", "odd": "no_image",
    }  # fmt: skip


def test_a_foreign_tar_is_indexed_once_and_its_folder_left_alone(tmp_path, monkeypatch):
    shard = foreign(tmp_path)
    first = load_index(shard)
    monkeypatch.setattr(index_module, "build_index", lambda shard: pytest.fail("indexed twice"))
    second = load_index(shard)
    assert second.table.equals(first.table)
    assert second.skipped == first.skipped
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.tar"]


def test_a_changed_foreign_tar_is_indexed_anew(tmp_path):
    shard = foreign(tmp_path)
    load_index(shard)
    write_tar(shard, [("new.jpg", JPEG), ("new.txt", b"new")])
    assert load_index(shard).table.column("key").to_pylist() == ["new"]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_foreign_tar_keeps_its_whole_samples(tmp_path, keep):
    members = [m for i in range(8) for m in ((f"{i}.jpg", JPEG), (f"{i}.txt", b"words"))]
    shard = write_tar(tmp_path / "a.tar", members)
    whole = build_index(shard)
    shard.write_bytes(shard.read_bytes()[: int(keep * 8 * (len(JPEG) // 512 + 4) * 512)])
    cut = build_index(shard)
    assert 0 < len(cut) < len(whole)
    assert cut.table.to_pylist() == whole.table.slice(0, len(cut)).to_pylist()
    assert "truncated" in dict(cut.skipped).values()


def test_a_dataset_has_the_same_hash_wherever_it_lies(tmp_path):
    write_samples(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    write_samples(tmp_path / "a")
    assert load_dataset(tmp_path / "a").content_hash == load_dataset(tmp_path / "b").content_hash


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b"image,caption\n"), ("a.parquet", b"PAR1"), ("a", b"\x1f\x8b")]
)
def test_what_is_no_tar_is_told_with_the_command_that_makes_shards_of_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content + bytes(600))
    with pytest.raises(ShardError, match=f"diptych shards build {tmp_path / name} --out shards"):
        load_dataset(tmp_path / name)


def test_a_single_tar_is_a_dataset(tmp_path):
    assert len(load_dataset(foreign(tmp_path))) == 2


def damage_missing(folder):
    (folder / "00001.tar").unlink()


def damage_cut(folder):
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])


def damage_description(folder):
    (folder / "dataset.json").write_text('{"version": 1')


def damage_version(folder):
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "version": 99}))


def damage_index(folder):
    (folder / "00001.arrow").write_bytes(b"not arrow")


def damage_swap(folder):
    first, second = folder / "00000.arrow", folder / "00001.arrow"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "00001.tar is missing"),
        (damage_cut, "00001.tar has .* bytes, not"),
        (damage_description, "dataset.json is damaged"),
        (damage_version, "has version 99"),
        (damage_index, "00001.arrow is not a shard index"),
        (damage_swap, "are not those that dataset.json describes"),
    ],
)
def test_a_damaged_dataset_is_refused_naming_the_file(tmp_path, damage, message):
    write_samples(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(ShardError, match=message):
        load_dataset(tmp_path / "data")


def test_nothing_there_and_nothing_usable_are_told_apart(tmp_path):
    with pytest.raises(NotFoundError, match="no such dataset"):
        load_dataset(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"no \.tar shards"):
        load_dataset(tmp_path / "empty")
    write_tar(tmp_path / "empty/a.tar", [("a.txt", b"words")])
    with pytest.raises(ShardError, match=r"no usable sample: no_image 1; the suffix"):
        load_dataset(tmp_path / "empty")
