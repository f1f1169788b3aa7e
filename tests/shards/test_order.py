import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.shards import order
from diptych.shards.order import EpochOrder, SourceOrder, derive_seed, hash_positions, permutation, uniforms
from reference import order as slow


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(0, 9))
def test_the_hash_equals_its_twin_in_python_integers(seed, positions, stream):
    fast = hash_positions(seed, np.array(positions, dtype=np.int64), stream)
    assert fast.tolist() == [slow.hash_position(seed, position, stream) for position in positions]


@pytest.mark.parametrize(("sizes", "block"), [([5], 64), ([3, 7, 1, 4], 2), ([2] * 9, 4), ([1, 1, 1], 1)])
def test_an_epoch_equals_its_twin_written_out(monkeypatch, sizes, block):
    monkeypatch.setattr(order, "BLOCK_SHARDS", block)
    source = SourceOrder(np.array(sizes), "hash", seed=3)
    for epoch in range(3):
        got = [source[epoch * sum(sizes) + i] for i in range(sum(sizes))]
        assert got == slow.epoch(sizes, derive_seed("order", "hash", 3), epoch, block, derive_seed)
        assert sorted(got) == list(range(sum(sizes)))


def test_every_epoch_has_its_own_order():
    source = SourceOrder(np.array([50, 50]), "hash", seed=0)
    epochs = [tuple(source[e * 100 + i] for i in range(100)) for e in range(3)]
    assert len(set(epochs)) == 3


def test_the_order_depends_on_seed_and_data_only():
    def first_ten(content_hash, seed):
        source = SourceOrder(np.array([1000]), content_hash, seed)
        return [source[i] for i in range(10)]

    assert first_ten("a", 0) == first_ten("a", 0)
    assert first_ten("a", 0) != first_ten("a", 1)
    assert first_ten("a", 0) != first_ten("b", 0)


def test_the_order_is_pinned():
    """A change here would silently reorder every run that is resumed."""
    assert permutation(8, 42).tolist() == slow.permutation(8, 42)
    assert [SourceOrder(np.array([4, 4]), "pinned", 0)[i] for i in range(8)] == [4, 5, 1, 0, 6, 3, 7, 2]


def test_weights_say_how_often_a_sample_is_seen():
    sources = [SourceOrder(np.array([n]), name, 0) for n, name in ((100, "a"), (40, "b"), (60, "c"))]
    mixed = EpochOrder(sources, [1.0, 0.25, 2.0], seed=0)
    assert mixed.samples == 100 + 10 + 120
    seen = np.zeros((3, 100), dtype=int)
    for epoch in range(4):
        for position in range(mixed.samples):
            place = mixed.place(epoch, position)
            seen[place.source, place.row] += 1
    assert set(seen[0]) == {4}
    assert set(seen[1, :40]) == {1}  # a quarter an epoch, each time another quarter
    assert set(seen[2, :60]) == {8}


def test_sources_are_mixed_evenly_along_an_epoch(monkeypatch):
    monkeypatch.setattr(order, "MIX_SAMPLES", 100)
    sources = [SourceOrder(np.array([n]), str(n), 0) for n in (900, 100)]
    mixed = EpochOrder(sources, [1.0, 1.0], seed=0)
    chosen = np.array([mixed.place(0, position).source for position in range(1000)])
    assert [int(chosen[i : i + 100].sum()) for i in range(0, 1000, 100)] == [10] * 10


def test_shuffling_is_good_enough_to_trust():
    """Neighbours of the file are far apart, and where a sample lands is uncorrelated with where it lies."""
    source = SourceOrder(np.full(64, 1000), "shuffle", seed=0)
    rows = np.array([source[i] for i in range(source.samples)])
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.02
    assert (np.abs(np.diff(rows)) < 10).mean() < 0.001


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(7, np.arange(20_000), 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
