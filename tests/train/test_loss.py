"""The tiled losses equal the dense ones of tests/reference, on one rank and on several."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch

from diptych.ranks import Ranks
from diptych.train import loss as losses
from diptych.train.loss import clip_loss, initial_logit_bias, siglip_loss
from reference import clip_loss as slow

TOLERANCE = 1e-5
"""Of value and gradients in float32, relative to their length."""


def features(n, width=12, noise=1.0, seed=0):
    """Pairs that agree the more, the less noise there is."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, width))
    text = (image if noise < 1 else 0) + noise * rng.normal(size=(n, width))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def ours(name, image, text, scale, bias=-2.0, groups=None):
    """Loss and every gradient: images, texts, t, and the bias if there is one."""
    image, text = (torch.tensor(x, requires_grad=True) for x in (image, text))
    t, bias = (torch.tensor(x, requires_grad=True) for x in (np.log(scale), bias))
    groups = None if groups is None else torch.tensor(groups)
    if name == "clip":
        loss = clip_loss(image, text, t.exp().float(), groups=groups)
    else:
        loss = siglip_loss(image, text, t.exp().float(), bias, groups=groups)
    loss.backward()
    return [loss.item(), image.grad, text.grad, t.grad] + ([bias.grad] if name == "siglip" else [])


def twin(name, image, text, scale, bias=-2.0, groups=None):
    image, text = image.astype(np.float64), text.astype(np.float64)
    t = np.log(np.float64(np.float32(scale)))
    if name == "clip":
        return slow.clip_loss(image, text, t, groups)
    return slow.siglip_loss(image, text, t, bias, groups)


def assert_equal(ours, theirs, floor=1e-7):
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b) + floor, (a, b)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("tile", [1, 3, 7, 1024])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 64])
def test_loss_and_every_gradient_equal_the_dense_twin_for_any_tile(name, tile, n, monkeypatch):
    monkeypatch.setitem(losses.TILE, "cpu", tile)
    for groups in (None, [i // 3 for i in range(n)], [i % 4 for i in range(n)], [0] * n):
        image, text = features(n)
        assert_equal(ours(name, image, text, 14.3, groups=groups), twin(name, image, text, 14.3, groups=groups))


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("noise", [1.0, 0.3, 0.05])
def test_every_temperature_and_every_state_of_training(name, scale, noise):
    image, text = features(257, width=64, noise=noise)
    # Pairs that agree: what is left of the gradient is a difference of nearly equal numbers, rounded at 1e-7 of one.
    assert_equal(ours(name, image, text, scale), twin(name, image, text, scale), floor=5e-6 * scale / 257)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("n", [1025, 4097])
def test_batches_of_several_tiles(name, n):
    image, text = features(n, width=64)
    assert_equal(ours(name, image, text, 14.3), twin(name, image, text, 14.3))


def test_bfloat16_features_are_taken_as_they_are_and_computed_in_float32():
    image, text = (torch.tensor(x).bfloat16().requires_grad_() for x in features(65))
    loss = clip_loss(image, text, torch.tensor(14.3))
    loss.backward()
    expected = twin("clip", image.detach().float().numpy(), text.detach().float().numpy(), 14.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert image.grad.dtype == torch.bfloat16
    difference = np.linalg.norm(image.grad.float().numpy() - expected[1])
    assert difference <= 2**-8 * np.linalg.norm(expected[1])  # the gradient is handed over in bfloat16


def test_loss_of_random_features_is_near_log_n():
    image, text = features(512, width=256)
    assert ours("clip", image, text, 1.0)[0] == pytest.approx(np.log(512), rel=1e-2)


def test_the_sigmoid_loss_begins_with_as_many_yes_as_there_are_pairs():
    p = 1 / (1 + np.exp(-initial_logit_bias(1000)))
    assert p == pytest.approx(1 / 1000)


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, torch
from diptych import ranks
from diptych.train.loss import clip_loss, siglip_loss
from test_loss import CASES, assert_equal, features, twin
job = ranks.connect(30)
for name, counts, grouped in CASES[job.world_size]:
    n = sum(counts)
    image, text = features(n, width=16)
    groups = [i % max(1, n // 2) for i in range(n)] if grouped else None
    first = sum(counts[: job.rank])
    mine = slice(first, first + counts[job.rank])
    x, y = (torch.tensor(f[mine]).requires_grad_() for f in (image, text))
    t, b = (torch.tensor(v, requires_grad=True) for v in (np.log(14.3), -2.0))
    g = None if groups is None else torch.tensor(groups)[mine]
    more = () if name == "clip" else (b,)
    loss = {{"clip": clip_loss, "siglip": siglip_loss}}[name](x, y, t.exp().float(), *more, groups=g, ranks=job)
    loss.backward()
    expected = twin(name, image, text, 14.3, groups=groups)
    scalars = job.sum(torch.stack([t.grad.double(), *(v.grad.double() for v in more)]))
    assert_equal([loss.item(), x.grad, y.grad], [expected[0], expected[1][mine], expected[2][mine]])
    assert_equal(scalars.tolist(), expected[3:])
rows = torch.arange(job.rank + 1.0)[:, None]
assert job.gather(rows).flatten().tolist() == [float(i) for r in range(job.world_size) for i in range(r + 1)]
assert job.counts(job.rank) == list(range(job.world_size))
assert job.broadcast("said" if job.is_first else None) == "said"
assert job.gather_objects(job.rank) == list(range(job.world_size))
assert job.all_reduce_max(job.rank) == job.world_size - 1
assert job.sent["all_gather"] > 0
ranks.disconnect(job)
print("good")
"""

CASES = {
    world_size: [
        (name, counts, grouped)
        for name in ("clip", "siglip")
        for grouped in (False, True)
        for counts in (
            [1] * world_size,
            list(range(1, world_size + 1)),  # uneven
            [0] + [5] * (world_size - 1),  # a rank without any
            [64 * (world_size - rank) + 1 for rank in range(world_size)],
            [4097 // world_size + (rank < 4097 % world_size) for rank in range(world_size)],
        )
    ]
    for world_size in (2, 3, 4)
}


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_several_ranks_have_the_loss_of_the_whole_batch_and_their_part_of_its_gradients(world_size):
    port = str(jobs.free_port())
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent)])
    processes = []
    for rank in range(world_size):
        job = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **job}
        command = [sys.executable, "-W", "error", "-c", script]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    assert jobs.finish(processes) == ["good\n"] * world_size


def test_one_rank_alone_exchanges_nothing():
    rows = torch.ones(3, 2)
    ranks = Ranks()
    assert ranks.gather(rows) is rows
    assert ranks.reduce_scatter(rows, [3]) is rows
    assert ranks.counts(3) == [3]
    assert not ranks.sent
