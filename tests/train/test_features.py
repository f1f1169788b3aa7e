"""Features of a locked tower, made once and kept."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diptych.checkpoint import layouts
from diptych.errors import UsageError
from diptych.pair import Pair
from diptych.shards.config import SourceConfig
from diptych.shards.dataset import load_dataset
from diptych.shards.write import write_shards
from diptych.train import loop
from diptych.train.finetune import features
from samples import TINY_VIT, encode, make_loaded, make_pairs, noise, train_config, write_samples


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start") / "model"
    layouts.save(make_loaded(TINY_VIT), folder)
    return str(folder)


def config(data: Path, out: Path, model: str, tower: str = "image", **changes):
    options = {"lock": tower, "feature_cache": out.parent / "features", **changes.pop("start", {})}
    changes = {"steps": 8, "warmup": 0, "augment": False} | changes
    return train_config(data, out, start_model=model, start=options, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "step_00000008/model.safetensors")


def assert_close(run: Path, expected: Path) -> None:
    """Biases of attention keys are left out: they have no effect, and no derivative but rounding."""
    ours, theirs = weights(run), weights(expected)
    for name, tensor in theirs.items():
        pair = [each.clone() for each in (ours[name], tensor)]
        if name.endswith("attn.in_proj.bias"):
            for each in pair:
                each.chunk(3)[1].zero_()
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_weights_are_those_of_a_run_without_the_cache(start, tmp_path, tower):
    data = write_samples(tmp_path / "data")
    loop.run(config(data, tmp_path / "cached", start, tower))
    assert list((tmp_path / "features").glob("*/features.npy"))
    loop.run(config(data, tmp_path / "plain", start, tower, start={"cache_features": "off"}))
    assert_close(tmp_path / "cached", tmp_path / "plain")


def test_once_features_are_there_no_picture_is_read(start, tmp_path):
    """The pictures are overwritten as soon as the features are made: a single one that was read would be counted."""
    data = write_samples(tmp_path / "data")
    told = []

    def overwrite(line: str) -> None:
        told.append(line)
        if "shard 4 of 4" in line:
            for shard in load_dataset(data).shards:
                with open(shard.path, "r+b") as tar:
                    for row in shard.table.to_pylist():
                        tar.seek(row["offset"])
                        tar.write(bytes(row["size"]))

    report = loop.run(config(data, tmp_path / "cached", start), on_note=overwrite)
    assert "features of the locked image tower: shard 4 of 4" in told
    assert (report.steps, report.skipped) == (8, {})
    with pytest.raises(Exception, match="broken pictures in a row"):  # without them the same data is useless
        loop.run(config(data, tmp_path / "plain", start, start={"cache_features": "off"}))


def test_another_run_finds_the_features_and_computes_none(start, tmp_path):
    data = write_samples(tmp_path / "data")
    loop.run(config(data, tmp_path / "one", start))
    told: list[str] = []
    loop.run(config(data, tmp_path / "two", start), on_note=told.append)
    assert not any("shard" in line for line in told)
    assert all(torch.equal(a, weights(tmp_path / "two")[n]) for n, a in weights(tmp_path / "one").items())


def test_another_tower_or_preprocessing_has_features_of_its_own(start, tmp_path):
    data = write_samples(tmp_path / "data")
    loop.run(config(data, tmp_path / "one", start))
    count = len(list((tmp_path / "features").iterdir()))
    for number, loaded in enumerate([make_loaded(TINY_VIT, seed=1), make_loaded(TINY_VIT, mean=(0.5, 0.5, 0.5))]):
        layouts.save(loaded, tmp_path / f"start{number}")
        loop.run(config(data, tmp_path / f"run{number}", str(tmp_path / f"start{number}")))
        assert len(list((tmp_path / "features").iterdir())) == count * (number + 2)


def test_a_damaged_file_of_features_is_made_anew(start, tmp_path):
    data = write_samples(tmp_path / "data")
    loop.run(config(data, tmp_path / "one", start))
    damaged = sorted((tmp_path / "features").glob("*/features.npy"))[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told: list[str] = []
    loop.run(config(data, tmp_path / "two", start), on_note=told.append)
    assert "features of the locked image tower: shard 1 of 1" in told
    assert damaged.read_bytes() == content


def test_leftovers_of_a_killed_process_are_removed(start, tmp_path):
    data = write_samples(tmp_path / "data", count=20)
    loop.run(config(data, tmp_path / "one", start))
    (place,) = (tmp_path / "features").iterdir()
    leftover = place.with_name(f".{place.name}.4194999.tmp")
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    (place / "about.json").unlink()
    loop.run(config(data, tmp_path / "two", start))
    assert not leftover.exists()


def test_a_broken_picture_is_stood_in_for_and_counted_as_without_the_cache(start, tmp_path):
    broken = Pair(key="broken", caption="a broken picture", image=encode(noise())[:300])
    write_shards([*make_pairs(40), broken], tmp_path / "data")
    for name, cached in (("cached", "auto"), ("plain", "off")):
        given = config(tmp_path / "data", tmp_path / name, start, batch_size=41, start={"cache_features": cached})
        assert loop.run(given).skipped == {"truncated": 8}
    assert_close(tmp_path / "cached", tmp_path / "plain")


def test_features_may_be_kept_in_half_the_bytes(start, tmp_path):
    data = write_samples(tmp_path / "data")
    loop.run(config(data, tmp_path / "half", start, start={"feature_type": "float16"}))
    found = [np.load(file, mmap_mode="r") for file in (tmp_path / "features").glob("*/features.npy")]
    assert {array.dtype for array in found} == {np.dtype("float16")}
    norms = np.concatenate([np.linalg.norm(array.astype(np.float32), axis=1) for array in found])
    assert len(norms) == 64
    np.testing.assert_allclose(norms, 1, atol=1e-3)


def test_where_features_cannot_be_kept_the_reason_is_said(start, tmp_path):
    data = write_samples(tmp_path / "data")
    told: list[str] = []
    loop.run(config(data, tmp_path / "run", start, augment=True, steps=2), on_note=told.append)
    expected = "not kept: pictures are cropped at random, so it never sees the same twice; --no-augment changes that"
    assert expected in told[0]
    assert not (tmp_path / "features").exists()


def test_reasons_by_config(tmp_path):
    given = config(tmp_path, tmp_path / "run", "m")
    assert features.why_not(given, 8, 4) is None
    assert features.why_not(given, 4, 4) == "the data is passed once"
    forced = dataclasses.replace(given, start=dataclasses.replace(given.start, cache_features="on"))
    assert features.why_not(forced, 4, 4) is None
    remote = (SourceConfig(url="s3://bucket/shards"),)
    assert "is not on this machine" in (features.why_not(dataclasses.replace(given, data=remote), 8, 4) or "")
    with pytest.raises(UsageError, match=r"needs shards on this machine, and s3://bucket/shards is not; copy it"):
        features.why_not(dataclasses.replace(forced, data=remote), 8, 4)
    text = config(tmp_path, tmp_path / "run", "m", "text", augment=True)
    assert features.why_not(text, 8, 4) is None
