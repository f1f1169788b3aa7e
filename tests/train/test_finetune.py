"""`diptych finetune` and `wise-ft` as commands, and processes that are killed or share the work."""

import hashlib
import json
import signal
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file

from diptych.checkpoint import layouts
from diptych.cli import main
from diptych.pair import Pair
from diptych.shards.write import write_shards
from diptych.train import loop
from samples import TINY_VIT, make_loaded, make_pairs, train_config, write_samples

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


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A model that knows all of its pictures."""
    out = tmp_path_factory.mktemp("trained") / "run"
    loop.run(train_config(data, out, steps=120, batch_size=64, lr=3e-3, warmup=10, augment=False))
    return out


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


@pytest.mark.parametrize("setting", ["cache", "lora"])
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


@pytest.mark.parametrize("setting", ["cache", "text and lora"])
def test_two_ranks_train_the_model_of_one(data, start, tmp_path, setting):
    for world_size in (1, 2):
        out = tmp_path / f"run{world_size}"
        jobs.run(data, out, world_size, **options(start, out, setting))
    for name in ("model.safetensors", "training.safetensors"):
        one, two = (load_file(tmp_path / f"run{n}/step_00000020" / name) for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one.keys() - {"rng.cpu"}:
            a, b = one[key], two[key]
            if key.endswith("in_proj.bias") and a.ndim:  # a bias of keys has no derivative but rounding
                a, b = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-8, key


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code  # pyright: ignore[reportReturnType]


def finetune(model, data, out, *arguments) -> int:
    usual = ["--batch-size", 16, "--workers", 0, "--precision", "float32"]
    return call("finetune", model, "--data", data, "--out", out, *usual, *arguments)


@pytest.fixture
def wrong(tmp_path) -> Path:
    """The same pictures under each other's captions."""
    pairs = make_pairs()
    captions = [pair.caption for pair in pairs[7:] + pairs[:7]]
    mixed = [Pair(key=p.key, caption=c, image=p.image, details={}) for p, c in zip(pairs, captions, strict=True)]
    write_shards(mixed, tmp_path / "wrong")
    return tmp_path / "wrong"


def test_the_guard_stops_a_run_that_loses_what_the_model_knew(trained, data, wrong, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--steps", 40, "--evaluate", f"known=retrieval:{data}", "--evaluate-every", 5, "--lr", 3e-3]
    assert finetune(trained, wrong, out, *arguments, "--stop-when-lost", 10) == 3
    said = capsys.readouterr().out
    assert "warning: a learning rate of 0.003 is one for training from scratch" in said
    assert "known/image_retrieval_recall@1   start 100.00%  now" in said
    assert "stopped: more than 10 points lost in known/" in said
    (folder,) = out.glob("step_*")
    assert 5 <= int(folder.name[5:]) < 40
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "evaluation" in line]
    assert evaluations[0]["step"] == 0
    assert evaluations[0]["evaluation"]["known/image_retrieval_recall@1"] == 1
    assert evaluations[-1]["step"] == int(folder.name[5:])

    assert finetune(trained, wrong, out, *arguments, "--stop-when-lost", 10) == 3  # nor does it go on by itself
    assert [f.name for f in out.glob("step_*")] == [folder.name]
    assert finetune(trained, wrong, out, *arguments) == 0  # but when it is told to
    assert (out / "step_00000040").exists()


def test_the_default_is_safe_and_looks_after_every_epoch(trained, data, wrong, tmp_path, capsys):
    assert finetune(trained, wrong, tmp_path / "run", "--epochs", 2, "--evaluate", f"known=retrieval:{data}") == 0
    said = capsys.readouterr().out
    assert "warning" not in said
    assert "step 4, beside the start:" in said
    assert "known/text_retrieval_recall@1    start 100.00%  now 100.00%  same" in said
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert (stored["optim"]["lr"], stored["optim"]["max_grad_norm"], stored["loss"]["patch_dropout"]) == (1e-5, 1, 0)


def test_patch_dropout_is_within_reach(trained, data, tmp_path):
    assert finetune(trained, data, tmp_path / "run", "--steps", 2, "--patch-dropout", 0.5) == 0


def test_wise_ft_writes_the_curve_and_the_best_model(trained, start, data, tmp_path, capsys):
    out = tmp_path / "wise"
    assert call("wise-ft", start, trained, "--evaluate", f"known=retrieval:{data}", "--out", out) == 0
    found = json.loads((out / "wise_ft.json").read_text())
    assert [point["alpha"] for point in found["curve"]] == [i / 10 for i in range(11)]
    assert found["curve"][-1]["metrics"]["known/image_retrieval_recall@1"] == 1
    best = max(found["curve"], key=lambda point: (point["score"], -point["alpha"]))
    assert found["best"] == best["alpha"]
    assert f"best: alpha {best['alpha']:.1f}" in capsys.readouterr().out
    model, ends = layouts.load(out / "model").model, [layouts.load(path).model for path in (start, trained)]
    a, b = (end.state_dict()["visual.proj"] for end in ends)
    expected = b if best["alpha"] == 1 else (1 - best["alpha"]) * a + best["alpha"] * b
    assert torch.equal(model.state_dict()["visual.proj"], expected)
    assert call("wise-ft", start, trained, "--evaluate", f"known=retrieval:{data}", "--out", out) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_wrong_input_is_said_in_one_line(start, data, tmp_path, capsys):
    assert finetune(tmp_path / "gone", data, tmp_path / "run") == 2
    assert f"diptych: no such model: {tmp_path / 'gone'}" in capsys.readouterr().err
    assert finetune(start, tmp_path / "nowhere", tmp_path / "run") == 2
    assert "diptych: no such dataset" in capsys.readouterr().err
    assert finetune(start, data, tmp_path / "run", "--lock", "vision") == 2
    error = capsys.readouterr().err
    assert "vision" in error
    assert "text" in error
    assert finetune(start, data, tmp_path / "run", "--stop-when-lost", 1) == 2
    assert "stop_when_lost needs something to be lost; add --evaluate NAME=PATH" in capsys.readouterr().err
