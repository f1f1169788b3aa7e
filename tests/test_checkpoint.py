import json
import random

import pytest
import torch

from diptych import checkpoint
from diptych.checkpoint import Loaded, TrainingState
from diptych.errors import CheckpointError, NotFoundError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig
from diptych.tokenizer import Tokenizer
from samples import TINY_RESNET, TINY_VIT


def make(config: CLIPConfig = TINY_VIT) -> Loaded:
    return Loaded(CLIP(config), Preprocess(image_size=32), Tokenizer.clip(16))


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET])
def test_what_is_saved_is_loaded_in_evaluation_mode(tmp_path, config):
    saved = make(config)
    checkpoint.save(tmp_path / "model", saved)
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.model.config == config
    assert not loaded.model.training
    assert (loaded.preprocess, loaded.tokenizer) == (saved.preprocess, saved.tokenizer)
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


def test_training_state_travels_with_the_model(tmp_path):
    state = TrainingState(tensors={"exp_avg.a": torch.arange(3.0)}, values={"step": 7})
    checkpoint.save(tmp_path / "model", make(), state)
    read = checkpoint.load_training(tmp_path / "model")
    assert read.values == {"step": 7}
    assert torch.equal(read.tensors["exp_avg.a"], torch.arange(3.0))


def test_a_model_without_training_state_cannot_be_continued(tmp_path):
    checkpoint.save(tmp_path / "model", make())
    with pytest.raises(CheckpointError, match="cannot be continued"):
        checkpoint.load_training(tmp_path / "model")


def test_any_flipped_bit_is_found_and_its_file_named(tmp_path):
    checkpoint.save(tmp_path / "model", make(), TrainingState(tensors={"x": torch.ones(3)}, values={"step": 1}))
    draw = random.Random(0)
    for file in sorted((tmp_path / "model").iterdir()):
        original = file.read_bytes()
        for _ in range(20):
            damaged = bytearray(original)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                checkpoint.load(tmp_path / "model")
        file.write_bytes(original)
    checkpoint.load(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path):
    checkpoint.save(tmp_path / "model", make())
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        checkpoint.load(tmp_path / "model")


def forge(folder, **changes):
    """Change checkpoint.json and make its own hash fit, as another program version would."""
    path = folder / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["self"]
    description |= changes
    path.write_text(json.dumps({**description, "self": checkpoint._fingerprint(description)}))


def test_a_newer_format_is_refused(tmp_path):
    checkpoint.save(tmp_path / "model", make())
    forge(tmp_path / "model", version=99)
    with pytest.raises(CheckpointError, match="format version 99; this diptych reads 1"):
        checkpoint.load(tmp_path / "model")


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint.save(tmp_path / "vit", make(TINY_VIT))
    with pytest.raises(CheckpointError, match=r"belongs to another model: .* are missing .*, .* unexpected"):
        checkpoint.load_weights(CLIP(TINY_RESNET), tmp_path / "vit")


def test_weights_of_another_size_are_refused_with_both_shapes(tmp_path):
    checkpoint.save(tmp_path / "vit", make(TINY_VIT))
    forge(
        tmp_path / "vit",
        model={**json.loads((tmp_path / "vit/checkpoint.json").read_text())["model"], "embed_dim": 8},
    )
    with pytest.raises(CheckpointError, match=r"shape \[32, 24\], not \[32, 8\]"):
        checkpoint.load(tmp_path / "vit")


def test_a_runs_folder_means_its_newest_intact_checkpoint(tmp_path):
    for step in (10, 20):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), make())
    (tmp_path / "step_00000020/model.safetensors").write_bytes(b"")
    assert checkpoint.find(tmp_path).name == "step_00000010"
    (tmp_path / "step_00000010/checkpoint.json").write_text("{")
    with pytest.raises(NotFoundError, match=r"unusable: .*step_00000020.*step_00000010"):
        checkpoint.find(tmp_path)


def test_a_path_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(NotFoundError, match="no such model"):
        checkpoint.load(tmp_path / "none")


def test_a_full_disk_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "model", make())
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "model", make())
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
