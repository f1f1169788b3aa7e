"""`diptych finetune` and `wise-ft` as commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from diptych.checkpoint import layouts
from diptych.cli import main
from diptych.pair import Pair
from diptych.shards.write import write_shards
from diptych.train import loop
from samples import TINY_VIT, draw, make_loaded, make_pairs, train_config, write_samples


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
    assert "stop-when-lost needs something to be lost; add --evaluate NAME=PATH" in capsys.readouterr().err


def test_an_evaluation_set_that_changed_is_not_compared_with_what_it_was(start, data, tmp_path, capsys):
    for colour, shape in [(c, s) for s in ("circle", "square", "dot") for c in ("red", "blue")]:
        (tmp_path / "set" / shape).mkdir(parents=True, exist_ok=True)
        draw(colour, shape).save(tmp_path / "set" / shape / f"{colour}.png")
    out, known = tmp_path / "run", f"known={tmp_path / 'set'}"
    steering = f"\x1b[31m={tmp_path / 'set'}"
    assert finetune(start, data, out, "--steps", 2, "--evaluate", known, steering) == 0
    assert "\x1b" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "set" / "dot")
    longer = ["--steps", 2, "--extend-to", 3, "--evaluate"]
    assert finetune(start, data, out, *longer, known) == 2
    assert "the evaluation set known is not the one that the run" in capsys.readouterr().err
    assert finetune(start, data, out, *longer, f"other={tmp_path / 'set'}") == 0
    told = capsys.readouterr().out
    assert "known/acc1" not in told  # what was found two steps ago is no number of now
