import json

import pytest

from diptych.cli import find_pictures, main
from diptych.errors import NotFoundError
from diptych.train import loop
from samples import draw, encode, noise, train_config, write_samples


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
    assert "continued from step 3" in capsys.readouterr().out


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
    assert "1 of 2 pictures were skipped" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "ViT-B32", "--data", "x", "--out", "y"], "did you mean ViT-B-32"),
        (["train", "RN-Ti", "--data", "nowhere", "--out", "y"], "no such dataset: nowhere"),
        (["train", "RN-Ti", "--data", "a@b", "--out", "y"], "PATH@WEIGHT"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--tokenizer", "none"], "no diptych_tokenizer.json in none"),
        (["classify", "nowhere.jpg", "--labels", "a"], "no such picture: nowhere.jpg"),
        (["classify", "*.nothing", "--labels", "a"], "no pictures in *.nothing"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("diptych: ")
    assert error.count("\n") == 1


def test_no_model_at_all_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(encode(noise()))
    assert call("classify", "a.jpg", "--labels", "a") == 2
    assert "pass --model, or run `make demo`" in capsys.readouterr().err


def test_pictures_are_found_in_folders_and_by_globs(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in find_pictures(["."])] == ["a.PNG", "b.jpg", "sub/c.webp"]
    assert [str(p) for p in find_pictures(["*.jpg", "notes.txt"])] == ["b.jpg", "notes.txt"]
    assert [p.name for p in find_pictures([f"{tmp_path}/*.jpg"])] == ["b.jpg"]
    with pytest.raises(NotFoundError):
        find_pictures(["sub/*.jpg"])
