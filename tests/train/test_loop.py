"""The tests that define the product: over-fit and retrieve, kill and resume bit for bit."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kill
from diptych.checkpoint import layouts
from diptych.checkpoint.formats import native
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import NonFiniteLossError, UsageError
from diptych.evaluate.metrics.measures import retrieval
from diptych.model.clip import CLIP
from diptych.pair import Pair
from diptych.shards.dataset import load_dataset
from diptych.shards.write import write_shards
from diptych.train import loop, step
from samples import TINY_RESNET, TINY_VIT, encode, make_pairs, noise, train_config, write_samples

TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from samples import train_config
from diptych.train import loop
torch.set_num_threads(1)
loop.run(train_config(Path({data!r}), Path({out!r}), checkpoint_every=10, workers={workers}, compile={compile}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


def start(data: Path, out: Path, workers: int, compile: bool) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1])
    script = TRAIN.format(tests=tests, data=str(data), out=str(out), workers=workers, compile=compile)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env=environment)


def fingerprint(out: Path) -> dict[str, str]:
    """Hashes of all that must come out the same."""
    final = out / "step_00000020"
    files = [
        final / "model.safetensors",
        final / "training.safetensors",
        out / "metrics.jsonl",
        out / "skipped.jsonl",
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(("workers", "compile"), [
    (1, False),
    *(pytest.param(workers, False, marks=pytest.mark.slow) for workers in (0, 2)),
    *(pytest.param(workers, True, marks=pytest.mark.slow) for workers in (0, 1, 2)),  # compiling takes a minute
])  # fmt: skip
def test_a_run_killed_and_resumed_equals_one_that_was_not(data, tmp_path, workers, compile):
    if compile and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(data, straight, 0, compile).wait() == 0

    process = start(data, killed, workers, compile)
    deadline = time.monotonic() + 300
    while not (killed / "step_00000010").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "step_00000020").exists(), "the run was over before it was killed"

    assert start(data, killed, workers, compile).wait() == 0
    assert fingerprint(killed) == fingerprint(straight)


@pytest.mark.slow
def test_a_tiny_model_overfits_64_pairs_and_retrieves_all_of_them(data, tmp_path):
    config = train_config(data, tmp_path / "run", model=TINY_VIT, steps=250, batch_size=64, lr=3e-3, warmup=10)
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, min_crop=1.0))
    loop.run(config)
    loaded = layouts.load(tmp_path / "run")
    pairs = list(load_dataset(data).pairs)
    images, texts = embed_images(loaded, [p.image for p in pairs]), embed_texts(loaded, [p.caption for p in pairs])
    assert set(retrieval(images, texts, ks=(1,)).values()) == {1.0}


def test_a_resnet_trains_and_its_running_statistics_are_saved(data, tmp_path):
    report = loop.run(train_config(data, tmp_path / "run", model=TINY_RESNET, steps=4))
    model = layouts.load(tmp_path / "run").model
    assert report.steps == 4
    assert model.visual.bn1.num_batches_tracked.item() == 4


def test_temperature_never_passes_100(data, tmp_path, monkeypatch):
    def rewarded_for_scale(image_features, text_features, logit_scale, **_):
        return (image_features.sum() + text_features.sum()) * 0 - logit_scale

    monkeypatch.setattr(step, "clip_loss", rewarded_for_scale)
    reports = []
    loop.run(train_config(data, tmp_path / "run", steps=8, lr=0.5, warmup=0), on_step=reports.append)
    assert max(report.logit_scale for report in reports) == pytest.approx(100, rel=1e-5)


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    config = train_config(data, tmp_path / "run", steps=4)
    loop.run(config)
    again = loop.run(config)
    assert (again.resumed_from, again.steps) == (4, 4)


def test_evaluators_see_the_model_in_evaluation_mode_and_their_numbers_are_kept(data, tmp_path):
    seen = []

    def evaluator(model: CLIP) -> dict[str, float]:
        seen.append(model.training)
        return {"answer": 42.0}

    report = loop.run(train_config(data, tmp_path / "run", steps=4, evaluate_every=2), evaluators=[evaluator])
    assert seen == [False, False]
    assert report.metrics == {"answer": 42.0}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data, tmp_path, monkeypatch):
    real, weights = step.clip_loss, {}

    def poisoned(image_features, text_features, logit_scale, **_):
        weights["calls"] = weights.get("calls", 0) + 1
        loss = real(image_features, text_features, logit_scale)
        return loss * float("nan") if weights["calls"] == 3 else loss

    monkeypatch.setattr(step, "clip_loss", poisoned)
    steps = []
    with pytest.raises(NonFiniteLossError, match=r"step 3 .*not updated"):
        loop.run(train_config(data, tmp_path / "run", steps=10), on_step=lambda report: steps.append(report.step))
    assert steps == [1, 2]


def test_a_broken_picture_is_stood_in_for_counted_and_named(tmp_path):
    broken = Pair(key="broken", caption="a broken picture", image=encode(noise())[:300])
    write_shards([*make_pairs(40), broken], tmp_path / "data")
    report = loop.run(train_config(tmp_path / "data", tmp_path / "run", steps=4, batch_size=41))
    assert report.skipped == {"truncated": 4}
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {("broken", "truncated")}


def test_another_runs_folder_is_refused_with_the_difference(data, tmp_path):
    loop.run(train_config(data, tmp_path / "run", steps=4))
    with pytest.raises(UsageError, match=r"lr 0\.001 there, 0\.01 here"):
        loop.run(train_config(data, tmp_path / "run", steps=4, lr=0.01))


def test_a_run_that_made_no_checkpoint_does_not_block_its_folder(data, tmp_path, monkeypatch):
    def interrupted(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(train_config(data, tmp_path / "run", steps=4), on_step=interrupted)
    assert loop.run(train_config(data, tmp_path / "run", steps=4, lr=0.01)).steps == 4


def test_a_resumed_run_keeps_the_precision_it_began_with(data, tmp_path, monkeypatch):
    config = train_config(data, tmp_path / "run", steps=4, checkpoint_every=2)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="auto"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    loop.run(config)
    (tmp_path / "run/step_00000004/model.safetensors").unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    loop.run(config)
    training = native.load_training(tmp_path / "run/step_00000004")
    assert training.values["dtype"] == "bfloat16"


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path):
    config = train_config(data, tmp_path / "run", steps=20, checkpoint_every=10)
    loop.run(config)
    expected = fingerprint(tmp_path / "run")
    weights = tmp_path / "run/step_00000020/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    report = loop.run(config)
    assert report.resumed_from == 10
    assert "model.safetensors" in report.passed_over[0]
    assert fingerprint(tmp_path / "run") == expected


def test_a_warmup_longer_than_the_run_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match="warmup 30 takes all of the 20 steps"):
        loop.run(train_config(data, tmp_path / "run", warmup=30))
    with pytest.raises(UsageError, match="use --recipe small-data, --warmup 1 or train longer"):
        loop.run(train_config(data, tmp_path / "run", warmup=2000))


def test_auto_precision_depends_on_the_processor_not_on_the_clock():
    run = train_config(Path(), Path()).run
    auto = dataclasses.replace(run, precision="auto")
    assert step.choose_dtype(auto, torch.device("cuda")) == torch.bfloat16
    assert step.choose_dtype(auto, torch.device("cpu")) == step.choose_dtype(auto, torch.device("cpu"))
    assert step.choose_dtype(dataclasses.replace(run, precision="bfloat16"), torch.device("cpu")) == torch.bfloat16


@pytest.mark.slow
def test_five_kills_at_awkward_moments_lose_nothing(tmp_path):
    moments = ("any time", "checkpoint", "checkpoint", "evaluation", "evaluation")
    data = write_samples(tmp_path / "data")
    reference = kill.finish(data, tmp_path / "straight", compiled=False)
    for number, moment in enumerate(moments):
        done = kill.kill_once(number, moment, data, tmp_path / "killed", reference, compiled=False)
        assert done.equal, done
        assert done.moment == moment
