import gc
import sys
import threading
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch

from diptych.decode import decode
from diptych.embed.stream import encode_stream
from diptych.errors import PictureError


class Squares:
    """Numbers to their squares; a number below nought is unusable. Remembers its batches."""

    streams = 2

    def __init__(self):
        self.batches = []

    def read(self, number):
        if number < 0:
            raise PictureError("negative", str(number))
        return number

    def encode(self, batch):
        self.batches.append(tuple(batch))
        return torch.tensor(batch).float().square()[:, None]


def plain_batches(items, size, group):
    """The slow twin: which numbers are computed together, where no batch meets its cap of unusable ones."""
    for _, members in groupby(items, lambda item: group(item[0])):
        usable = [number for _, number in members if number >= 0]
        yield from (tuple(usable[start : start + size]) for start in range(0, len(usable), size))


@pytest.mark.parametrize("group", [lambda key: None, lambda key: key // 10, lambda key: key % 2])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 50, 333])
def test_each_input_has_its_outcome_in_order_and_batches_depend_on_inputs_alone(count, group):
    items = [(key, -1 if key % 7 == 3 else key) for key in range(count)]
    encoder = Squares()
    found = list(encode_stream(encoder, iter(items), batch_size=4, group=group))
    assert [key for key, _ in found] == list(range(count))
    for (_, number), (_, outcome) in zip(items, found, strict=True):
        if number < 0:
            assert isinstance(outcome, PictureError)
        else:
            assert outcome.tolist() == [number**2]
    assert sorted(encoder.batches) == sorted(plain_batches(items, 4, group))


def test_a_short_stream_is_batched_as_a_long_one_without_the_shortcut():
    where = set()
    encoder = Squares()
    encoder.encode = lambda batch: (where.add(threading.current_thread().name), Squares().encode(batch))[1]
    assert [one.item() for _, one in encode_stream(encoder, enumerate([2, 3]), batch_size=4)] == [4, 9]
    assert where == {"MainThread"}
    where.clear()
    found = encode_stream(encoder, enumerate([2, 3]), batch_size=4, together=False, threads=1)
    assert [one.item() for _, one in found] == [4, 9]
    assert "MainThread" not in where


def test_unusable_inputs_do_not_change_what_is_computed_together():
    items = list(enumerate([1] + [-1] * 20 + [2, 3] + [-1] * 3 + [4, 5]))
    encoder = Squares()
    outcomes = [outcome for _, outcome in encode_stream(encoder, items, batch_size=4, together=False)]
    assert [isinstance(outcome, PictureError) for outcome in outcomes] == [number < 0 for _, number in items]
    assert sorted(encoder.batches) == [(1, 2, 3, 4), (5,)]


def test_rubbish_streams():
    taken = []
    items = ((key, taken.append(key) or -1) for key in range(10_000))
    stream = encode_stream(Squares(), items, batch_size=4)
    key, outcome = next(stream)
    assert (key, isinstance(outcome, PictureError)) == (0, True)
    assert len(taken) < 100
    stream.close()


def test_what_could_not_be_used_is_not_kept():
    """A stream of broken pictures held all of them until Python looked for circles: 1 MB each."""
    pictures = [bytes([i]) * 5000 for i in range(40)]
    before = [sys.getrefcount(one) for one in pictures]
    encoder = SimpleNamespace(streams=1, read=decode, encode=lambda batch: torch.ones(len(batch), 1))
    gc.disable()
    try:
        outcomes = list(encode_stream(encoder, ((i, pictures[i]) for i in range(40)), batch_size=8))
        assert [error.reason for _, error in outcomes] == ["not_a_picture"] * 40
        assert [sys.getrefcount(one) for one in pictures] == before
    finally:
        gc.enable()


def test_an_error_of_the_encoder_comes_out_and_stops_the_threads():
    def fail(batch):
        raise ValueError("no memory")

    before = threading.active_count()
    encoder = SimpleNamespace(streams=2, read=lambda number: number, encode=fail)
    with pytest.raises(ValueError, match="no memory"):
        list(encode_stream(encoder, enumerate(range(50)), batch_size=4))
    assert threading.active_count() == before
