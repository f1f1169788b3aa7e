"""Fine-tuning in processes of its own: killed, or sharing the work."""

import hashlib
import signal
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file

from diptych.checkpoint import layouts
from samples import TINY_VIT, make_loaded, write_samples

SETTINGS = {
    "cache": {"lock": "image"},
    "lora": {"lora_rank": 2, "layer_decay": 0.5},
    "text and lora": {"lock": "text", "lora_rank": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    layouts.save(make_loaded(TINY_VIT), folder)
    return folder


def options(start: Path, out: Path, setting: str, **changes) -> dict:
    cache = out.parent / f"{out.name}-features"
    given = {"start_model": str(start), "start": {"feature_cache": cache, **SETTINGS[setting]}}
    return {"checkpoint_every": 10, "warmup": 0, "lr": 1e-3, "augment": False, **given, **changes}


def fingerprint(out: Path) -> dict[str, str]:
    final = out / "step_00000020"
    files = [final / "model.safetensors", final / "training.safetensors", out / "metrics.jsonl"]
    files += [file for file in (out / "adapter/adapter_model.safetensors",) if file.exists()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


KILL = "__import__('os').kill(__import__('os').getpid(), 9)"


@pytest.mark.parametrize("setting", ["cache", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(data, start, tmp_path, setting):
    evaluate = (f"found=retrieval:{data}",)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    jobs.run(data, straight, 1, evaluate=evaluate, **options(start, straight, setting))

    def start_and_kill(**moment: str) -> None:
        (process,) = jobs.start(data, killed, 1, evaluate=evaluate, **moment, **options(start, killed, setting))
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL

    if setting == "cache":  # in the middle of making the features
        start_and_kill(on_note=f"'shard 2 of 4' in line and {KILL}")
        assert len(list((tmp_path / "killed-features").iterdir())) == 2
        assert not list(killed.glob("step_*"))
    start_and_kill(on_step=f"report.step == 15 and {KILL}")
    assert [folder.name for folder in killed.glob("step_*")] == ["step_00000010"]
    jobs.run(data, killed, 1, evaluate=evaluate, **options(start, killed, setting))
    assert fingerprint(killed) == fingerprint(straight)


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(data, start, tmp_path):
    for world_size in (1, 2):
        out = tmp_path / f"run{world_size}"
        jobs.run(data, out, world_size, **options(start, out, "text and lora"))
    for name in ("model.safetensors", "training.safetensors"):
        one, two = (load_file(tmp_path / f"run{n}/step_00000020" / name) for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one.keys() - {"rng.cpu"}:
            a, b = one[key], two[key]
            if key.endswith("in_proj.bias") and a.ndim:  # a bias of keys has no derivative but rounding
                a, b = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8, key
