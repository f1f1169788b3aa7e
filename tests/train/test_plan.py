"""The plan against what really happens: bytes of real optimizers, bytes between real processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch

from diptych.errors import UsageError
from diptych.model.clip import CLIP
from diptych.model.config import PRESETS, get_preset
from diptych.train import loss, plan
from diptych.train.config import OptimConfig
from diptych.train.optim import build_optimizer
from diptych.train.plan import PlanConfig, PlanReport
from samples import TINY_RESNET, TINY_VIT

MODELS = {"TINY_VIT": TINY_VIT, "TINY_RESNET": TINY_RESNET}


def run(preset: str = "ViT-B-32", **changes) -> PlanReport:
    return plan.run(PlanConfig(**changes), get_preset(preset))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_with_its_exact_parameters(name):
    with torch.device("meta"):
        model = CLIP(get_preset(name))
    assert run(name).parameters["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_bias_of_the_logits_is_a_parameter():
    biased = plan.run(PlanConfig(), replace(TINY_VIT, logit_bias=True)).parameters["total"]
    assert biased == plan.run(PlanConfig(), TINY_VIT).parameters["total"] + 1


def test_bytes_of_a_step_are_those_of_the_page():
    report, parameters = run(micro_batch_size=1024), 151_277_313
    assert report.memory["weights"] == report.memory["gradients"] == 4 * parameters
    assert report.memory["statistics"] == 8 * parameters
    assert report.memory["features"] == 4 * 512 * (4 * 4096 + 2 * 32768)
    assert report.memory["loss"] == 4 * (3 * 4096 * 8192 + 2 * (4096 + 32768) + 8 * 32768)
    assert report.memory["gathered"] == report.wire["weights"] == 0
    assert report.wire["gradients"] == 2 * 4 * parameters * 7 // 8
    assert report.wire["text_features"] == report.wire["text_gradients"] == 4 * 32768 * 512 * 7 // 8
    assert report.wire["sums"] == 4 * 32768 * 7
    for bytes_by_name in (report.memory, report.wire):
        assert bytes_by_name["total"] == sum(size for name, size in bytes_by_name.items() if name != "total")


def test_operations_of_a_step_are_those_of_the_page():
    whole, cached = run(devices=64), run(devices=64, micro_batch_size=256)
    flops, forward = whole.flops_per_pair, whole.flops_per_pair["forward"]
    assert (flops["backward"], flops["cache"], flops["recompute"]) == (2 * forward, 0, 0)
    assert flops["loss"] == 8 * 32768 * 512
    assert flops["total"] == 3 * forward + flops["loss"]
    assert cached.flops_per_pair["total"] == flops["total"] + forward
    recomputed = run(devices=64, recompute=True).flops_per_pair
    assert 0.6 * forward < recomputed["recompute"] < 0.7 * forward  # the last product of a block is not


def test_time_is_operations_over_peak_and_share_of_it():
    report = run("ViT-L-14", devices=64, utilisation=0.5)
    assert report.seconds["compute"] == pytest.approx(report.flops_per_pair["total"] * 512 / (989e12 * 0.5))
    assert report.seconds["wire"] == pytest.approx(report.wire["total"] / 400e9)
    assert report.seconds["step"] == max(report.seconds["compute"], report.seconds["wire"])
    assert report.steps == {"epoch": 12207, "run": 12207 * 32}
    assert report.seconds["run"] == pytest.approx(report.seconds["step"] * 12207 * 32)


def test_one_device_sends_nothing():
    assert run(devices=1).wire["total"] == run(devices=1, sharding="fsdp").wire["total"] == 0
    assert run(devices=1).seconds["wire"] == 0


@pytest.mark.parametrize("changes", [{}, {"sharding": "fsdp"}, {"recompute": True}, {"precision": "float32"}])
def test_by_default_as_many_pairs_are_taken_as_fit(changes):
    report = run("ViT-L-14", **changes)
    assert report.micro_batch_size == report.largest_micro_batch < 4096
    assert report.fits
    assert not run("ViT-L-14", micro_batch_size=2 * report.largest_micro_batch, **changes).fits
    assert report.largest_micro_batch.bit_count() == 1


def test_all_pairs_are_taken_where_all_fit():
    report = run("RN-Ti", batch_size=3000, devices=2)
    assert (report.largest_micro_batch, report.micro_batches, report.flops_per_pair["cache"]) == (1500, 1, 0)


def test_a_model_that_does_not_fit_is_planned_all_the_same():
    report = run("ViT-bigG-14", device_kind="v100")
    assert (report.fits, report.largest_micro_batch, report.micro_batch_size) == (False, 0, 1)
    assert run("ViT-bigG-14", device_kind="v100", sharding="fsdp").fits


def test_sharding_cuts_what_is_kept_and_sends_more():
    cut, whole = run("ViT-L-14", sharding="fsdp"), run("ViT-L-14")
    for name in ("weights", "gradients", "statistics"):
        assert cut.memory[name] == pytest.approx(whole.memory[name] / 8, rel=1e-6)
    assert cut.wire["total"] > whole.wire["total"]


@pytest.mark.parametrize("half_statistics", [False, True])
def test_statistics_are_the_optimizers(half_statistics):
    model = CLIP(TINY_VIT)
    optimizer = build_optimizer(model, OptimConfig(half_statistics=half_statistics))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    config = PlanConfig(half_statistics=half_statistics)
    assert plan.run(config, TINY_VIT).memory["statistics"] == pytest.approx(real, rel=1e-3)


def test_tiles_are_those_of_the_loss():
    assert plan.DEVICES["cpu"].tile == loss.TILE["cpu"]
    assert {plan.DEVICES[kind].tile for kind in plan.DEVICES.keys() - {"cpu"}} == {loss.TILE["cuda"]}


# --- bytes between processes ----------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, types
sys.path.insert(0, {tests!r})
from collections import Counter
import torch, torch.distributed as dist
import samples
from diptych import ranks as jobs
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.train.parallel import wrap as parallel
from diptych.train.step import Step
torch.set_num_threads(1)
config, ranks, sent = samples.{model}, jobs.connect(device="cpu"), Counter()

def count(kind):  # what FSDP2 and the loss call
    exchange = getattr(dist, kind)
    def counted(*tensors, **named):
        whole = max((t for t in (*tensors, *named.values()) if isinstance(t, torch.Tensor)), key=torch.numel)
        sent[kind] += whole.nbytes * (ranks.world_size - 1) // ranks.world_size
        return exchange(*tensors, **named)
    setattr(dist, kind, counted)

count("all_gather_single")
count("reduce_scatter_single")
model = CLIP(config)
engine = parallel.wrap(model, ranks, {sharding!r})
batch = types.SimpleNamespace(
    image=torch.zeros({pairs}, 3, 32, 32, dtype=torch.uint8),
    text=torch.full(({pairs}, 16), config.text.vocab_size - 1),
    image_features=None,
    text_features=None,
)
step = Step(model=engine, plain=model, ranks=ranks, seed=0, preprocess=Preprocess(image_size=32),
            device=torch.device("cpu"), dtype=torch.float32)
step.gradients(batch, 0, {micro_batch_size})
print(json.dumps(sent | {{"gradients": ranks.sent["gradients"]}}))
jobs.disconnect(ranks)
"""


def sent_by_two_ranks(**values) -> dict[str, int]:
    """Bytes that the first of two real processes sends in a step, by kind of exchange."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), **values)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return json.loads(jobs.finish(processes)[0])


@pytest.mark.parametrize(
    ("model", "sharding", "micro_batch_size"),
    [
        *(("TINY_VIT", "ddp", 32), ("TINY_VIT", "ddp", 10)),
        *(("TINY_VIT", "fsdp", 32), ("TINY_VIT", "fsdp", 10), ("TINY_RESNET", "fsdp", 8)),
    ],
)
def test_two_real_processes_send_what_was_planned(model, sharding, micro_batch_size):
    pairs = 32
    real = sent_by_two_ranks(model=model, sharding=sharding, micro_batch_size=micro_batch_size, pairs=pairs)
    config = PlanConfig(
        batch_size=2 * pairs, devices=2, sharding=sharding, micro_batch_size=micro_batch_size, samples=1e4
    )
    wire = plan.run(config, MODELS[model]).wire
    gathered, scattered = wire["weights"] + wire["text_features"] + wire["sums"], wire["text_gradients"]
    if sharding == "ddp":
        assert real["gradients"] == wire["gradients"]
    else:
        scattered += wire["gradients"]
    counts = 3 * 8  # how many pairs the other rank has; and fsdp pads what it cuts
    assert real["all_gather_single"] == pytest.approx(gathered + counts, rel=1e-4)
    assert real["reduce_scatter_single"] == pytest.approx(scattered, rel=1e-3)


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 592}, "batch_size 32768 does not split evenly over 592 devices; use --batch-size 32560 or 33152"),
        ({"batch_size": 4}, "over 8 devices; use --batch-size 8,"),
        ({"devices": 0}, "devices 0 must be above 0"),
        ({"batch_size": -1}, "batch_size -1 must be above 0"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 must be above 0"),
        ({"micro_batch_size": 4097}, "more than the 4096 pairs of a device; use --micro-batch-size 4096 or less"),
        ({"utilisation": 40.0}, "utilisation 40.0 is a share of the peak"),
        ({"samples": 1e3}, "1000 samples are less than one batch of 32768; use a smaller --batch-size"),
        ({"caption_tokens": 78}, "a caption of 78 tokens does not fit; use 2 to 77"),
    ],
)
def test_what_cannot_be_planned_says_what_can(changes, message):
    with pytest.raises(UsageError) as caught:
        run(**changes)
    assert message in str(caught.value)
