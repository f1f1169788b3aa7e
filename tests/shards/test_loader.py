import dataclasses
import json
from contextlib import closing
from itertools import islice

import pytest
import torch

from diptych.errors import NotFoundError, ShardError, UsageError
from diptych.pair import Pair
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.loader import Batch, Loader
from diptych.shards.write import write_shards
from samples import encode, make_pairs, noise, write_samples, write_tar


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), hash_text(caption)] for caption in captions])


def hash_text(text: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(text))


def build(*folders, **config) -> Loader:
    ranks = {key: config.pop(key) for key in ("rank", "world_size") if key in config}
    sources = [f if isinstance(f, SourceConfig) else SourceConfig(path=f) for f in folders]
    return Loader(sources, LoaderConfig(**{"batch_size": 8, "workers": 0} | config), 24, tokenize, **ranks)


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert [x.keys for x in a] == [y.keys for y in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.image, y.image)
        assert torch.equal(x.text, y.text)
        assert x.position == y.position


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("loader") / "data", count=50, samples_per_shard=16)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_are_the_same_for_any_number_of_workers(data, workers):
    assert_same(take(build(data), 15), take(build(data, workers=workers), 15))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_take_slices_of_the_same_batches(data, world_size):
    whole = take(build(data), 8)
    parts = [take(build(data, rank=rank, world_size=world_size), 8) for rank in range(world_size)]
    for i, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[i].image for part in parts]), batch.image)
        assert sum((part[i].keys for part in parts), ()) == batch.keys


@pytest.mark.parametrize("consumed", [0, 1, 5, 6, 7, 13])
def test_resuming_anywhere_gives_the_batches_that_would_have_come(data, consumed):
    straight = take(build(data), 20)
    loader = build(data, workers=2)
    if consumed:
        loader.seek(straight[consumed - 1].position)
    assert_same(take(loader, 20 - consumed), straight[consumed:])


def test_the_position_is_that_of_batches_handed_out_not_of_those_read_ahead(data):
    loader = build(data, workers=2, prefetch=5)
    take(loader, 3)
    assert loader.position.samples_consumed == 24


def test_an_epoch_shows_every_sample_once_but_for_the_last_partial_batch(data):
    loader = build(data)
    keys = [key for batch in take(loader, loader.batches_per_epoch) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 48
    assert loader.position.epoch == 1
    assert loader.position.samples_consumed == 0


def test_crops_differ_between_epochs_and_seeds_but_not_between_runs(data):
    def picture(seed, epoch):
        loader = build(data, seed=seed, min_crop=0.5)
        batches = take(loader, (epoch + 1) * loader.batches_per_epoch)[-loader.batches_per_epoch :]
        return next(b.image[b.keys.index("red-ring")] for b in batches if "red-ring" in b.keys)

    assert torch.equal(picture(2, 0), picture(2, 0))
    assert not torch.equal(picture(2, 0), picture(2, 2))


def test_a_position_of_other_data_seed_or_batch_size_is_refused(data, tmp_path):
    position = build(data).position
    other = write_samples(tmp_path / "other", count=30)
    for loader, field in (
        (build(other), "dataset_hash"),
        (build(data, seed=1), "seed"),
        (build(data, batch_size=4), "batch_size"),
    ):
        with pytest.raises(UsageError, match=f"the stored position has {field}"):
            loader.seek(position)


def test_a_broken_picture_is_stood_in_for_by_the_next_row_on_every_path(tmp_path):
    broken = [
        Pair(key="cut", caption="x", image=encode(noise())[:200]),
        Pair(key="bomb", caption="x", image=b"\x89PNG\r\n\x1a\n" + bytes(50)),
    ]
    pairs = make_pairs(30)
    write_shards([*pairs[:10], *broken, *pairs[10:]], tmp_path / "data")
    batches = take(build(tmp_path / "data"), 4)
    assert_same(batches, take(build(tmp_path / "data", workers=2), 4))
    # "bomb" is in its own place, and would have stood in for "cut"
    assert sorted(s for b in batches for s in b.skipped) == [("bomb", "not_a_picture")] * 2 + [("cut", "truncated")]
    assert all(len(batch.image) == 8 for batch in batches)
    assert not {"cut", "bomb"} & {key for batch in batches for key in batch.keys}


def test_a_picture_that_changed_under_its_index_is_not_used(tmp_path):
    folder = write_samples(tmp_path / "data", count=20)
    whole = {key for batch in take(build(folder, batch_size=4), 5) for key in batch.keys}
    row = load_dataset(folder).shards[0].table.slice(7, 1).to_pylist()[0]
    with open(folder / "00000.tar", "r+b") as tar:
        tar.seek(row["offset"] + row["size"] - 1)  # decoders do not miss the last byte
        tar.write(b"\x00")
    batches = take(build(folder, batch_size=4), 5)
    assert [s for batch in batches for s in batch.skipped] == [(row["key"], "changed")]
    assert {key for batch in batches for key in batch.keys} == whole - {row["key"]}


def test_a_dataset_of_broken_pictures_ends_with_an_error(tmp_path):
    write_shards([Pair(key=str(i), caption="x", image=b"\xff\xd8\xff") for i in range(20)], tmp_path / "data")
    with pytest.raises(ShardError, match="100 broken pictures in a row"):
        take(build(tmp_path / "data", workers=1), 1)


def test_several_sources_are_weighted(data, tmp_path):
    more = tmp_path / "more"
    write_shards([dataclasses.replace(p, key=f"more-{p.key}") for p in make_pairs(40)], more)
    loader = build(data, SourceConfig(path=more, weight=0.5))
    assert loader.batches_per_epoch == (50 + 20) // 8
    keys = [key for batch in take(loader, loader.batches_per_epoch) for key in batch.keys]
    assert 16 <= sum(key.startswith("more-") for key in keys) <= 20


def test_impossible_loaders_are_refused_with_the_cure(data, tmp_path):
    with pytest.raises(UsageError, match="less than one batch of 64"):
        build(data, batch_size=64)
    with pytest.raises(UsageError, match="does not divide among 3 ranks"):
        build(data, world_size=3)
    with pytest.raises(UsageError, match="no data was named"):
        build()
    with pytest.raises(NotFoundError, match="no such dataset"):
        build(tmp_path / "none")


def test_a_picture_with_several_captions_has_one_of_them_at_each_visit(tmp_path):
    several = {f"{i}": [f"{i} {word}" for word in ("one", "two", "three")] for i in range(6)}
    members = [
        member
        for key, captions in several.items()
        for member in (
            (f"{key}.jpg", encode(noise(seed=int(key)))),
            (f"{key}.txt", b"not these"),
            (f"{key}.json", json.dumps({"texts": [*captions, " ", 7], "title": captions[0]}).encode()),
        )
    ]
    nothing = [("x.jpg", encode(noise(seed=9))), ("x.json", b'{"texts": []}')]
    tar = write_tar(tmp_path / "a.tar", members + nothing)
    dataset = load_dataset(tar, caption_key="texts")
    assert sorted(dataset.captions) == sorted(text for captions in several.values() for text in captions)
    assert list(dataset.skipped) == [("a.tar", "x", "no_caption")]
    batches = take(build(tar, batch_size=2, caption_key="texts"), 60)
    seen = {key: set() for key in several}
    for batch in batches:
        for key, text in zip(batch.keys, batch.text.tolist(), strict=True):
            seen[key].add(tuple(text))
    assert {key: {tuple(row) for row in tokenize(captions).tolist()} for key, captions in several.items()} == seen
    assert_same(batches, take(build(tar, batch_size=2, caption_key="texts", workers=3), 60))
    resumed = build(tar, batch_size=2, caption_key="texts")
    resumed.seek(batches[30].position)
    assert_same(batches[31:], take(resumed, 29))
    assert load_dataset(tar).content_hash != dataset.content_hash != load_dataset(tar, caption_key="title").content_hash


def test_captions_under_another_name_are_found_in_shards_of_our_own_and_elsewhere(tmp_path):
    write_samples(tmp_path / "data", count=20)
    first = load_dataset(tmp_path / "data", caption_key="label")
    assert set(first.captions) == {pair.details["label"] for pair in make_pairs(20)}
    (tmp_path / "data" / "dataset.json").unlink()
    assert load_dataset(tmp_path / "data", caption_key="label").content_hash == first.content_hash
    remote = SourceConfig(url=f"file://{tmp_path}/data")
    loaders = [build(one, caption_key="label", cache=tmp_path / "cache") for one in (tmp_path / "data", remote)]
    assert_same(*(take(loader, 4) for loader in loaders))


def test_shards_are_named_by_ranges_and_globs(tmp_path):
    write_samples(tmp_path / "data", count=50, samples_per_shard=16)
    whole = load_dataset(tmp_path / "data")
    assert len(whole.shards) == 4
    for name in ("{00000..00003}.tar", "*.tar", "{0..0}000[0-3].tar"):
        assert load_dataset(tmp_path / "data" / name).content_hash == whole.content_hash
    source = SourceConfig.parse(f"{tmp_path}/data/{{00001..00002}}.tar@2")
    assert build(source).samples_per_epoch == 2 * sum(whole.sizes[1:3])
    for name, message in (
        ("{00003..00004}.tar", "no such shard: .*00004.tar"),
        ("x*.tar", "no such dataset"),
        ("{2..1}.tar", "the range"),
    ):
        with pytest.raises((NotFoundError, UsageError), match=message):
            load_dataset(tmp_path / "data" / name)
