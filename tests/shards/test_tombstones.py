from contextlib import closing
from itertools import islice

import pytest
import server
import torch

from diptych.errors import ShardError
from diptych.evaluate.training_evaluators import open_set
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.loader import Batch, Loader
from diptych.shards.tombstones import TOMBSTONES_FILE, write_tombstones
from samples import write_samples


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


def take(source: SourceConfig, count: int, **config) -> list[Batch]:
    loader = Loader([source], LoaderConfig(**{"batch_size": 8, "workers": 0} | config), 24, tokenize)
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


@pytest.fixture
def data(tmp_path):
    return write_samples(tmp_path / "data", count=48, samples_per_shard=16)


@pytest.mark.parametrize("strict", [False, True])
def test_a_deleted_sample_gives_its_place_to_the_next_and_all_else_stays(data, strict):
    source = SourceConfig(path=data)
    before = take(source, 6)
    gone = before[2].keys[3]
    write_tombstones(data, [gone, "no such key"])
    after = take(source, 6, strict=strict)
    assert after[2].skipped == ((gone, "deleted"),)
    assert not any(gone in batch.keys for batch in after)
    assert [batch.position for batch in after] == [batch.position for batch in before]
    others = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x.keys, y.keys, strict=True)]
    assert [a for a, b in others if a != b] == [gone]


def test_more_deleted_neighbours_than_broken_ones_are_allowed_are_passed_over(data, monkeypatch):
    monkeypatch.setattr("diptych.shards.loader.MAX_CONSECUTIVE_BROKEN", 3)
    keys = [key for shard in load_dataset(data).shards for key in shard.table["key"].to_pylist()]
    write_tombstones(data, keys[:40])
    assert {key for batch in take(SourceConfig(path=data), 6) for key in batch.keys} == set(keys[40:])


def test_tombstones_beside_shards_elsewhere_are_asked_for_at_every_start(data, tmp_path):
    with server.serve(data) as http:
        for url in (http.url, f"{http.url}/{{00000..00002}}.tar", f"{http.url}/00000.tar"):
            (data / TOMBSTONES_FILE).unlink(missing_ok=True)
            source, cache = SourceConfig(url=url), tmp_path / "cache"
            gone = take(source, 1, cache=cache)[0].keys[0]
            write_tombstones(data, [gone])
            assert (gone, "deleted") in take(source, 1, cache=cache)[0].skipped


def test_a_store_that_forbids_what_is_not_there_has_no_tombstones(data, tmp_path, caplog):
    write_tombstones(data, [])
    with server.serve(data) as http:
        http.fault = lambda name, nth, body: (403, body, 0.0) if name == TOMBSTONES_FILE else None
        assert take(SourceConfig(url=http.url), 1, cache=tmp_path / "cache")[0].skipped == ()
    assert "tombstones.json is forbidden" in caplog.text


def test_tombstones_beside_foreign_shards_and_for_evaluation_sets_count(data):
    (data / "dataset.json").unlink()
    gone = next(iter(load_dataset(data).pairs))
    write_tombstones(data, [gone.key])
    assert gone.key not in {pair.key for pair in load_dataset(data).pairs}
    exam = open_set(data, "retrieval")
    assert (len(exam.samples), exam.samples.skipped["deleted"]) == (47, 1)
    assert gone.key not in {pair.key for pair in load_dataset(data / "00000.tar").pairs}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 1, "keys": [1]}', '{"version": 2, "keys": []}'])
def test_tombstones_that_cannot_be_read_are_not_guessed(data, content):
    (data / TOMBSTONES_FILE).write_text(content)
    with pytest.raises(ShardError, match=r"tombstones.json (is damaged|has version 2)"):
        load_dataset(data)


def test_a_dataset_of_which_all_was_deleted_is_told(data):
    write_tombstones(data, [pair.key for pair in load_dataset(data).pairs])
    with pytest.raises(ShardError, match=r"every sample of .* was deleted"):
        load_dataset(data)
