import importlib.util
from dataclasses import replace

import onnxruntime
import pytest
import torch

from diptych.checkpoint import layouts
from diptych.checkpoint.formats import onnx
from diptych.errors import CheckpointError, NotFoundError, UsageError
from samples import TINY_RESNET, TINY_VIT, make_loaded, small

VIT = small(TINY_VIT)
CONFIGS = {
    "vit": VIT,
    "resnet": small(TINY_RESNET, activation="gelu"),
    "conv": replace(VIT, vision=replace(VIT.vision, stem="conv"), activation="gelu"),
}


def run(path, name, example):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: example.numpy()})[0])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_both_towers_compute_the_same_under_onnxruntime_for_any_number_of_inputs(tmp_path, name):
    loaded = make_loaded(CONFIGS[name])
    differences = layouts.convert(loaded, tmp_path / "out", "onnx")
    assert set(differences) == {"image", "text"}
    assert max(differences.values()) < 1e-5
    for count in (1, 5):
        image = torch.randn(count, 3, 32, 32)
        text = loaded.tokenizer(["the cat", "", "and the cat " * 20, "?", "cat"][:count])
        for tower, example, ours in (
            ("image", image, loaded.model.encode_image(image)),
            ("text", text, loaded.model.encode_text(text)),
        ):
            theirs = run(tmp_path / "out" / f"{tower}.onnx", tower, example)
            assert ((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).max() < 1e-5
    with pytest.raises(NotFoundError, match="a computation that cannot be read back"):
        layouts.load(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        *("image.onnx", "text.onnx", "preprocess.json", "diptych_tokenizer.json")
    }


@torch.no_grad()
def test_the_plain_text_tower_equals_the_real_one():
    loaded = make_loaded(replace(VIT, text=replace(VIT.text, layers=3, heads=2)))
    text = loaded.tokenizer([("the cat and " * (i % 7)) for i in range(150)])
    ours, plain = loaded.model.encode_text(text), onnx.PlainText(loaded.model.text)(text)
    assert (ours - plain).abs().max() < 1e-5


def test_a_model_in_training_is_exported_in_evaluation_mode_and_left_as_it_was(tmp_path, capfd):
    model = make_loaded(CONFIGS["resnet"]).model.train()
    model.visual.layer1.eval()  # frozen: one flag for all would not bring this back
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    onnx.export(model, tmp_path)
    assert max(onnx.compare(model, tmp_path).values()) < 1e-5
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "".join(capfd.readouterr()) == ""


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    loaded, other = make_loaded(VIT), make_loaded(VIT, seed=1)
    export = onnx.export
    monkeypatch.setattr(onnx, "export", lambda model, folder: export(other.model, folder))
    with pytest.raises(CheckpointError, match="image features differ"):
        layouts.convert(loaded, tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UsageError, match=r"needs the package onnxscript; pip install '\.\[onnx\]'"):
        layouts.save(make_loaded(VIT), tmp_path / "out", "onnx")


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(UsageError, match="written in float32"):
        layouts.convert(make_loaded(VIT), tmp_path / "out", "onnx", precision="bfloat16")
