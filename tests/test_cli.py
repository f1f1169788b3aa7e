import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diptych import __version__
from diptych.checkpoint import layouts
from diptych.checkpoint.formats import conventions, native
from diptych.cli import exit_on_error, main
from diptych.cli.classify import find_pictures
from diptych.errors import NotFoundError
from diptych.train import loop
from samples import (
    SMALL_VOCABULARY,
    TINY_RESNET,
    TINY_VIT,
    draw,
    encode,
    make_loaded,
    noise,
    small,
    train_config,
    write_samples,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    loop.run(train_config(write_samples(folder / "data"), folder / "run", steps=4))
    return folder / "run"


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_train_makes_a_run_and_says_how_it_ended(tmp_path, capsys):
    data = write_samples(tmp_path / "data")
    arguments = ["train", "RN-Ti", "--data", data, "--out", tmp_path / "run", "--steps", 3, "--warmup", 1]
    arguments += ["--batch-size", 8, "--workers", 0, "--precision", "float32"]
    assert call(*arguments) == 0
    assert "step 3, 24 pairs seen" in capsys.readouterr().out
    assert (tmp_path / "run/step_00000003/model.safetensors").exists()
    assert call(*arguments) == 0
    assert "nothing was left to train" in capsys.readouterr().out


def test_plan_prints_a_table_for_people(capsys):
    assert call("plan", "ViT-L-14", "--devices", 256, "--device-kind", "v100", "--recompute") == 0
    output = capsys.readouterr().out
    for part in (
        *("ViT-L-14: 32,768 pairs a step on 256 v100, 128 on each, 128 at once; ddp, bfloat16", "427,616,513"),
        *("recompute", "activations", "text gradients", "days", "GB of 28.80 GB that may be filled: fits"),
        *("largest micro-batch that fits: 128 of the device's 128 pairs", "at 40% of the device's peak"),
    ):
        assert part in output, part


def test_plan_says_what_to_do_when_nothing_fits(capsys):
    assert call("plan", "ViT-bigG-14", "--device-kind", "v100") == 0
    output = capsys.readouterr().out
    assert "GB that may be filled: does not fit" in output
    assert "not even one pair at a time fits; try --sharding fsdp" in output


def test_plan_prints_json_for_machines(capsys):
    assert call("plan", "RN50", "--devices", 64, "--samples", "12.8e9", "--epochs", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["config"]["devices"], found["config"]["samples"]) == ("RN50", 64, 12.8e9)
    assert found["parameters"] == {"image": 38_316_896, "text": 63_690_240, "total": 102_007_137}
    assert found["memory"]["total"] <= found["usable_memory"] == 72e9
    assert found["seconds"]["run"] == pytest.approx(found["seconds"]["step"] * found["steps"]["run"])


def test_a_plan_that_cannot_be_says_what_can(capsys):
    assert call("plan", "ViT-L-14", "--devices", 592) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "diptych: --batch-size 32768 does not split evenly over 592 devices; use --batch-size 32560"
    )


def test_classify_prints_bars_for_people(run, tmp_path, capsys):
    draw("red", "dot").save(tmp_path / "a.png")
    assert call("classify", tmp_path / "a.png", "--labels", "red dot", "blue ring", "--model", run) == 0
    output = capsys.readouterr().out
    assert "a.png" in output
    assert "red dot" in output
    assert "%" in output


def test_classify_prints_json_for_machines(run, tmp_path, capsys):
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(encode(noise()))
    assert call("classify", tmp_path, "--labels", "x|y", "z", "w", "--model", run, "--json", "--top", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"].rsplit("/", 1)[1] for line in lines] == ["a.jpg", "b.jpg"]
    assert all(len(line["labels"]) == 2 for line in lines)
    assert {answer["label"] for line in lines for answer in line["labels"]} <= {"x", "z", "w"}


def test_one_bad_picture_costs_that_picture_only(run, tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(encode(noise())[:200])
    (tmp_path / "b.jpg").write_bytes(encode(noise()))
    assert call("classify", tmp_path, "--labels", "x", "y", "--model", run, "--json") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "a.jpg: skipped, truncated" in captured.err
    assert "skipped: 1 of 2 pictures (truncated 1)\n" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluat"], "unknown command 'evaluat'; did you mean evaluate? Known: classify, convert, "),
        (["evaluat", "clip", "--out", "x"], "unknown command 'evaluat'; did you mean evaluate? "),
        (["embed", "m", "x", "--out", "y", "--batch-size", "0"], "diptych: --batch-size 0 must be at least 1"),
        (["embed", "m", "x", "--out", "y", "--part-rows", "0"], "diptych: --part-rows 0 must be at least 1"),
        (["embed", "m", "x", "--out", "y", "--threads", "0"], "diptych: --threads 0 must be at least 1"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--batch-size", "0"], "diptych: --batch-size 0 "),
        (["train", "ViT-B32", "--data", "x", "--out", "y"], "did you mean ViT-B-32"),
        (["train", "RN-Ti", "--data", "nowhere", "--out", "y"], "no such dataset: nowhere"),
        (["train", "RN-Ti", "--data", "a@b", "--out", "y"], "PATH@WEIGHT"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--tokenizer", "none"], "no such tokenizer folder: none"),
        (["plan", "ViT-L14"], "unknown architecture 'ViT-L14'; did you mean ViT-L-14"),
        (["plan", "ViT-B-32", "--caption-tokens", "78"], "a caption of 78 tokens does not fit; use 2 to 77"),
        (["classify", "--labels", "a"], "no picture was named; give pictures, folders of pictures, or globs"),
        (
            ["classify", "", "--labels", "a"],
            "the argument behind classify is empty; is it a variable",
        ),
        (["classify", "a.jpg", "--labels", "a", "--top", "0"], "--top 0 must be at least 1"),
        (["classify", "a.jpg", "--labels", "a", "--top", "-1"], "--top -1 must be at least 1"),
        (["classify", "a.jpg", "--labels", ""], "the argument behind --labels is empty"),
        (["classify", "a.jpg", "--labels", " "], "class ' ' has an empty name"),
        (["train", "RN-Ti", "--data", "x", "--out="], "--out= has no value; is it a variable that was not set?"),
        (["plan", "ViT-B-32", "--epochs", "nan"], "--epochs nan is no number that can be used"),
        (["plan", "ViT-B-32", "--utilisation", "nan"], "--utilisation nan is no number that can be used"),
        (
            ["curate", "filter", "--folder", "a", "--out", "b", "--language-margin", "nan"],
            "--language-margin nan ",
        ),
        (["classify", "a.jpg", "--labels", "a", "b|"], "class 'b|' has an empty name"),
        (["classify", "a.jpg", "--labels", "a", "--device", "foo"], "no device 'foo' here; PyTorch finds cpu"),
        (["classify", "nowhere.jpg", "--labels", "a"], "no such picture: nowhere.jpg"),
        (["classify", "*.nothing", "--labels", "a"], "no pictures in *.nothing"),
        (["classify", "a.jpg", "--labels", "a", "--labels", "b"], "--labels is given 2 times; give it once, with all"),
        (["train", "RN-Ti", "--data=x", "--out", "y", "--data", "z"], "--data is given 2 times"),
        (["plan", "ViT-B-32", "--caption_tokens", "8", "--caption-tokens", "9"], "--caption-tokens is given 2 times"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode(noise()))
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("diptych: ")
    assert error.count("\n") == 1


def test_what_the_parser_itself_refuses_is_still_shown(capsys):
    assert call("embed", "m", "x") == 2
    assert "--out" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"diptych {__version__}\n"


@pytest.mark.parametrize("arguments", [["train", "--help"], ["plan", "RN50", "--json"], ["evaluat"]])
def test_a_reader_that_stops_early_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "diptych", *arguments]
    wrong = arguments == ["evaluat"]  # its one line goes to stderr, which then is what nobody reads
    streams = {"stdout": subprocess.PIPE, "stderr": writer} if wrong else {"stdout": writer, "stderr": subprocess.PIPE}
    ended = subprocess.run(command, **streams, text=True, check=False)
    os.close(writer)
    assert ended.returncode == 141
    assert not (ended.stdout if wrong else ended.stderr)


def test_another_pipe_that_breaks_is_not_passed_over(capfd):
    with pytest.raises(BrokenPipeError), exit_on_error():
        raise BrokenPipeError


def test_no_model_at_all_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode(noise()))
    assert call("classify", "a.jpg", "--labels", "a") == 2
    assert "or run `make demo`" in capsys.readouterr().err


def test_pictures_are_found_in_folders_and_by_globs(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_pictures(["."]) == ([Path("a.PNG"), Path("b.jpg"), Path("sub/c.webp")], {".txt": 1})
    assert find_pictures(["*.jpg", "notes.txt"])[0] == [Path("b.jpg"), Path("notes.txt")]
    assert find_pictures([f"{tmp_path}/*.jpg"])[0] == [tmp_path / "b.jpg"]
    assert find_pictures(["*"]) == ([Path("a.PNG"), Path("b.jpg")], {".txt": 1})
    with pytest.raises(NotFoundError):
        find_pictures(["sub/*.jpg"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_run_holds(run, capsys):
    assert call("inspect", run) == 0
    output = capsys.readouterr().out
    for part in (
        *(
            "layout:         diptych",
            "ViT, patch 8, width 32, 2 layers of 2 heads, 32 px",
            "quick_gelu (checkpoint.json",
        ),
        *("32 px, bicubic, shorter side, centre crop", "OpenAI's vocabulary, 49,408 ids", "float32 ", "sha256 "),
        *("model.safetensors", "parameters in all"),
    ):
        assert part in output, part


def test_inspect_prints_json_for_machines_and_needs_no_activation(tmp_path, capsys):
    loaded = make_loaded(small(TINY_VIT))
    SMALL_VOCABULARY.save(tmp_path)
    torch.save(conventions.openai_state(loaded.model.state_dict().items()), tmp_path / "bare.pt")
    assert call("inspect", tmp_path / "bare.pt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["activation"], found["model"]["activation"]) == ("state dict", None, None)
    assert found["parameters"]["total"] == sum(p.numel() for p in loaded.model.parameters())
    assert found["dtype"] == {"float32": found["parameters"]["total"]}
    digest = hashlib.sha256((tmp_path / "bare.pt").read_bytes()).hexdigest()
    assert found["files"]["bare.pt"] == {"bytes": (tmp_path / "bare.pt").stat().st_size, "sha256": digest}
    assert call("inspect", tmp_path / "bare.pt") == 0
    assert "activation:     not known (nothing shows it: --activation quick_gelu or" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers", "openai"])
def test_convert_writes_a_layout_that_classify_takes(tmp_path, capsys, layout):
    width = 64  # OpenAI's layout takes 64 channels a head for granted
    text = replace(TINY_VIT.text, width=width, heads=1)
    vision = replace(TINY_VIT.vision, width=width, heads=1)
    native.save(tmp_path / "model", make_loaded(replace(TINY_VIT, text=text, vision=vision)))
    out = tmp_path / "out"
    arguments = ["convert", tmp_path / "model", out, "--to", layout, "--image-size", 48, "--context-length", 20]
    assert call(*arguments) == 0
    printed = capsys.readouterr().out
    assert "image features of the resized model and of what was written differ by 0.0e+00" in printed
    assert f"written: {out} ({layout}, float32)" in printed
    assert call(*arguments) == 2
    assert "exists; name another place, or --overwrite" in capsys.readouterr().err
    assert call(*arguments, "--overwrite", "--precision", "float16") == 0
    capsys.readouterr()
    (tmp_path / "a.png").write_bytes(encode(noise(), "PNG"))
    activation = ["--activation", "quick_gelu"] if layout == "openai" else []
    assert call("classify", tmp_path / "a.png", "--labels", "x", "y", "--json", "--model", out, *activation) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 2
    assert layouts.load(out, activation="quick_gelu").tokenizer.context_length == 20


def test_verify_finds_a_model_sound_or_names_what_is_wrong(run, tmp_path, capsys):
    assert call("verify", run) == 0
    output = capsys.readouterr().out
    assert "model.safetensors  (agrees with XXH3 in checkpoint.json)" in output
    assert "every number finite; temperature" in output
    assert output.endswith("sound\n")
    loaded = make_loaded(small(TINY_RESNET))
    with torch.no_grad():
        loaded.model.visual.layer1[0].bn1.running_var[1] = -1
    native.save(tmp_path / "negative", loaded)
    assert call("verify", tmp_path / "negative") == 2
    assert "visual.layer1.0.bn1.running_var holds negative variances" in capsys.readouterr().err
    with torch.no_grad():
        loaded.model.visual.layer1[0].bn1.running_var[1] = 1
        loaded.model.text.text_projection[2, 3] = float("nan")
    native.save(tmp_path / "nan", loaded)
    assert call("verify", tmp_path / "nan") == 2
    assert "text.text_projection holds values that are no numbers (1 NaN)" in capsys.readouterr().err


def test_verify_says_when_there_was_no_hash_to_hold_a_file_to(tmp_path, capsys):
    layouts.save(make_loaded(small(TINY_VIT)), tmp_path / "m", "transformers")
    assert call("verify", tmp_path / "m") == 0
    assert capsys.readouterr().out.endswith("sound, as far as a file without a stored hash can show\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "no such model: nowhere"),
        (["verify", "ViT-B-32/opnai"], "ViT-B-32/openai"),
        (["convert", "nowhere", "out", "--to", "openai"], "no such model: nowhere"),
        (["convert", "hf-hub:x", "out", "--to", "openai"], "names no repository"),
    ],
)
def test_a_wrong_model_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("diptych: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_cannot_hold_a_model_says_why(tmp_path, capsys):
    native.save(tmp_path / "rn", make_loaded(small(TINY_RESNET)))
    assert call("convert", tmp_path / "rn", tmp_path / "out", "--to", "transformers") == 2
    assert "cannot hold this model: transformers' CLIPModel has no ResNet image tower" in capsys.readouterr().err


def test_training_on_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    data = write_samples(tmp_path / "data")
    assert call("train", "RN-Ti", "--data", data, "--out", tmp_path / "run", "--device", "cuda:99") == 2
    assert capsys.readouterr().err.startswith("diptych: no device 'cuda:99' here; PyTorch finds cpu")
