import json
import random
import re
from pathlib import Path

import pytest
import torch

from diptych.checkpoint import layouts
from diptych.checkpoint.formats import native
from diptych.checkpoint.formats.native import TrainingState
from diptych.checkpoint.loaded import Loaded
from diptych.errors import CheckpointError, NotFoundError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig
from diptych.tokenizer import Tokenizer
from samples import TINY_RESNET, TINY_VIT, make_loaded, small

# of an image of linspace(-2, 2), by the program that wrote tests/fixtures/checkpoint_v1
FEATURES_OF_VERSION_1 = [0.228486, 2.589522, 0.291704, 1.923590, -0.956446, -1.077293, 0.510646, -0.105748]


def make(config: CLIPConfig = TINY_VIT) -> Loaded:
    return Loaded(CLIP(config), Preprocess(image_size=32), Tokenizer.clip(16))


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET])
def test_what_is_saved_is_loaded_in_evaluation_mode(tmp_path, config):
    saved = make(config)
    native.save(tmp_path / "model", saved)
    loaded = layouts.load(tmp_path / "model")
    assert loaded.model.config == config
    assert not loaded.model.training
    assert (loaded.preprocess, loaded.tokenizer) == (saved.preprocess, saved.tokenizer)
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


def test_training_state_travels_with_the_model(tmp_path):
    state = TrainingState(tensors={"exp_avg.a": torch.arange(3.0)}, values={"step": 7})
    native.save(tmp_path / "model", make(), state)
    read = native.load_training(tmp_path / "model")
    assert read.values == {"step": 7}
    assert torch.equal(read.tensors["exp_avg.a"], torch.arange(3.0))


def test_a_model_without_training_state_cannot_be_continued(tmp_path):
    native.save(tmp_path / "model", make())
    with pytest.raises(CheckpointError, match="cannot be continued"):
        native.load_training(tmp_path / "model")


@pytest.mark.slow
def test_of_a_thousand_flipped_bits_every_one_is_found_and_its_file_named(tmp_path):
    loaded = make_loaded(small(TINY_VIT))
    native.save(tmp_path / "model", loaded)
    draw = random.Random(0)
    files = sorted((tmp_path / "model").iterdir())
    originals = {file: file.read_bytes() for file in files}
    sizes = [len(data) for data in originals.values()]
    for flip in range(1000):
        # half of them anywhere, the other half in the small files and in the header of the weights
        file = files[flip % len(files)] if flip % 2 else draw.choices(files, sizes)[0]
        end = sizes[files.index(file)]
        damaged = bytearray(originals[file])
        damaged[draw.randrange(end if flip % 4 else min(end, 4096))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{re.escape(file.name)} is damaged"):
            layouts.load(tmp_path / "model")
        file.write_bytes(originals[file])
    layouts.load(tmp_path / "model")


def test_a_flipped_bit_of_the_training_state_is_found_too(tmp_path):
    native.save(tmp_path / "model", make(), TrainingState(tensors={"x": torch.ones(3)}, values={"step": 1}))
    for name in ("training.json", "training.safetensors"):
        file = tmp_path / "model" / name
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name):
            native.read_description(tmp_path / "model")
        file.write_bytes(original)


def test_a_checkpoint_of_format_version_1_is_still_read():
    loaded = layouts.load(Path(__file__).parents[1] / "fixtures/checkpoint_v1")
    assert loaded.model.config.text.mlp_ratio == 4
    assert loaded.preprocess.resize == "shorter_side"
    image = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)
    features = loaded.model.encode_image(image)[0]
    assert torch.allclose(features, torch.tensor(FEATURES_OF_VERSION_1), atol=1e-5)


def test_every_version_before_todays_has_a_migration():
    assert list(native.MIGRATIONS) == list(range(1, native.FORMAT_VERSION))


def test_a_saved_file_that_names_a_way_out_of_the_folder_is_refused(tmp_path):
    native.save(tmp_path / "model", make())
    (tmp_path / "other").write_text("x")
    listed = json.loads((tmp_path / "model/checkpoint.json").read_text())["files"]
    forge(tmp_path / "model", files=listed | {"../other": {"bytes": 1, "xxh3": "0"}})
    with pytest.raises(CheckpointError, match="names the file"):
        layouts.load(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path):
    native.save(tmp_path / "model", make())
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        layouts.load(tmp_path / "model")


def forge(folder, **changes):
    """Change checkpoint.json and make its own hash fit, as another program version would."""
    path = folder / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["self"]
    description |= changes
    path.write_text(json.dumps({**description, "self": native._fingerprint(description)}))


def test_a_newer_format_is_refused(tmp_path):
    native.save(tmp_path / "model", make())
    forge(tmp_path / "model", version=99)
    with pytest.raises(CheckpointError, match="format version 99; this diptych reads 1 to 3"):
        layouts.load(tmp_path / "model")


def test_weights_of_another_model_are_refused(tmp_path):
    native.save(tmp_path / "vit", make(TINY_VIT))
    with pytest.raises(CheckpointError, match=r"belongs to another model: .* are missing .*, .* unexpected"):
        native.map_weights(CLIP(TINY_RESNET), tmp_path / "vit")


def test_weights_of_another_size_are_refused_with_both_shapes(tmp_path):
    native.save(tmp_path / "vit", make(TINY_VIT))
    forge(
        tmp_path / "vit",
        model={**json.loads((tmp_path / "vit/checkpoint.json").read_text())["model"], "embed_dim": 8},
    )
    with pytest.raises(CheckpointError, match=r"shape \[32, 24\], not \[32, 8\]"):
        layouts.load(tmp_path / "vit")


def test_a_runs_folder_means_its_newest_intact_checkpoint(tmp_path):
    for step in (10, 20):
        native.save(native.step_folder(tmp_path, step), make())
    (tmp_path / "step_00000020/model.safetensors").write_bytes(b"")
    assert native.find(tmp_path).name == "step_00000010"
    (tmp_path / "step_00000010/checkpoint.json").write_text("{")
    with pytest.raises(NotFoundError, match=r"unusable: .*step_00000020.*step_00000010"):
        native.find(tmp_path)


def test_a_path_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(NotFoundError, match="no such model"):
        layouts.load(tmp_path / "none")


def test_a_full_disk_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    native.save(tmp_path / "model", make())
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(native, "write_parts", full)
    with pytest.raises(OSError, match="no space"):
        native.save(tmp_path / "model", make())
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
