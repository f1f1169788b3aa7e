"""Several real processes over gloo: the same run as one process, whatever their number."""

import json
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file

from samples import write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    jobs.run(data, out, 1, steps=50, checkpoint_every=50, loss={"patch_dropout": 0.5})
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out: Path, expected: Path, step: int = 50) -> None:
    torch.testing.assert_close(losses(out), losses(expected), rtol=1e-4, atol=1e-5)
    folder = f"step_{step:08d}"
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (load_file(run / folder / name) for run in (out, expected))
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"rng.cpu"}:
            a, b = ours[key], theirs[key]
            if key.endswith("in_proj.bias") and a.ndim:  # a bias of keys has no effect, and no derivative but rounding
                a, b = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9, key


@pytest.mark.parametrize(("world_size", "sharding"), [
    *((2, "ddp"), (2, "fsdp")),
    pytest.param(4, "ddp", marks=pytest.mark.slow),
])  # fmt: skip
def test_any_number_of_ranks_trains_the_same_model(data, alone, tmp_path, world_size, sharding):
    jobs.run(
        data, tmp_path / "run", world_size, steps=50, checkpoint_every=50, sharding=sharding,
        loss={"patch_dropout": 0.5},
    )  # fmt: skip
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_of_two_ranks_goes_on_with_another_number(data, alone, tmp_path, world_size):
    stop = "report.step == 25 and __import__('os').kill(__import__('os').getpid(), 15)"
    jobs.run(data, tmp_path / "run", 2, steps=50, checkpoint_every=50, loss={"patch_dropout": 0.5}, on_step=stop)
    assert (tmp_path / "run/step_00000025").exists()
    jobs.run(data, tmp_path / "run", world_size, steps=50, checkpoint_every=50, loss={"patch_dropout": 0.5})
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize("options", [
    pytest.param({"micro_batch_size": 3}, marks=pytest.mark.slow),
    {"micro_batch_size": 3, "sharding": "fsdp"},
    pytest.param({"recompute": True, "loss": {"positives": "caption"}}, marks=pytest.mark.slow),
    pytest.param({"recompute": True, "sharding": "fsdp"}, marks=pytest.mark.slow),
    pytest.param({"loss": {"loss": "siglip"}}, marks=pytest.mark.slow),
    pytest.param({"half_statistics": True, "sharding": "fsdp"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_way_of_sharing_agrees_with_one_process(data, tmp_path, options):
    plain = {name: value for name, value in options.items() if name in ("loss", "half_statistics")}
    for out, world_size, more in (("one", 1, plain), ("two", 2, options)):
        jobs.run(data, tmp_path / out, world_size, steps=8, checkpoint_every=8, **more)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_a_resnets_running_statistics_are_the_mean_over_ranks(data, tmp_path):
    jobs.run(data, tmp_path / "run", 2, steps=3, checkpoint_every=3, model="TINY_RESNET")
    state = load_file(tmp_path / "run/step_00000003/model.safetensors")
    assert state["visual.bn1.num_batches_tracked"] == 3
    assert state["visual.bn1.running_var"].isfinite().all()


def test_a_lost_rank_ends_in_one_clear_error_and_the_next_start_goes_on(data, tmp_path):
    die = "report.step == 5 and __import__('os').environ['RANK'] == '1' and __import__('os')._exit(1)"
    first, second = jobs.start(data, tmp_path / "run", 2, steps=8, checkpoint_every=4, timeout=20.0, on_step=die)
    output = first.communicate(timeout=60)[0]
    second.communicate(timeout=60)
    assert first.returncode == 2
    assert "RankLostError rank 0 of 2 lost the others" in output
    assert "continues from the last checkpoint" in output
    jobs.run(data, tmp_path / "run", 2, steps=8, checkpoint_every=4)
    assert len(losses(tmp_path / "run")) == 8
