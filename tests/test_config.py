import json
from pathlib import Path

import pytest

from diptych.config import from_dict, hide_secrets, to_dict
from diptych.errors import UsageError
from diptych.model.config import PRESETS, CLIPConfig, ResNetConfig, TextConfig, ViTConfig, get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from samples import TINY_RESNET, TINY_VIT, train_config


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY_VIT, TINY_RESNET])
def test_a_model_config_survives_json(config):
    assert from_dict(CLIPConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_whole_run_survives_json():
    config = train_config(Path("a"), Path("b"))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_an_unknown_key_is_an_error_that_names_it():
    with pytest.raises(UsageError, match="unknown key in OptimConfig 'learning_rate'"):
        from_dict(OptimConfig, {"learning_rate": 1.0})


def test_an_unknown_tower_type_is_an_error():
    with pytest.raises(UsageError, match="unknown config type 'MLPMixer'"):
        from_dict(CLIPConfig, {"vision": {"type": "MLPMixer"}})


def test_a_near_miss_of_a_preset_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean ViT-B-32"):
        get_preset("ViT-B/32")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTConfig(image_size=50, patch_size=16), "image_size 50 is not a multiple of patch_size 16; use 48"),
        (lambda: ViTConfig(width=100, heads=3), "width 100 is not divisible by heads 3"),
        (lambda: ViTConfig(image_size=224, patch_size=14, stem="conv"), "power of two"),
        (lambda: ResNetConfig(image_size=100), "multiple of 32"),
        (lambda: TextConfig(context_length=2), "at least 3"),
        (lambda: LoaderConfig(batch_size=1), "nothing to contrast with"),
        (lambda: LoaderConfig(min_crop=0.0), "min_crop"),
        (lambda: SourceConfig(path=Path("x"), weight=0.0), "above 0"),
        (lambda: SourceConfig.parse("a@b"), "PATH@WEIGHT"),
        (lambda: OptimConfig(lr=0.0), "lr"),
        (lambda: OptimConfig(beta1=1.0), r"beta1 1.0 is not a share in \[0, 1\)"),
        (lambda: OptimConfig(beta2=-0.1), "beta2 -0.1"),
        (lambda: OptimConfig(eps=0.0), "eps 0.0 must be above 0"),
        (lambda: OptimConfig(max_grad_norm=-1.0), "max_grad_norm -1.0 must be above 0"),
        (lambda: RunConfig(timeout=0.0), "timeout 0.0 must be above 0"),
        (lambda: RunConfig(checkpoint_minutes=-1.0), "checkpoint_minutes -1.0 must be above 0"),
    ],
)
def test_contradictions_are_refused_where_they_are_written(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_a_source_is_written_as_path_at_weight():
    assert SourceConfig.parse("a/b@0.5") == SourceConfig(path=Path("a/b"), weight=0.5)
    assert SourceConfig.parse("a/b") == SourceConfig(path=Path("a/b"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(OptimConfig, "lr"), (OptimConfig, "weight_decay"), (RunConfig, "epochs"), (LossConfig, "patch_dropout")],
)
def test_a_setting_that_is_no_number_is_refused_by_name(kind, name, value):
    with pytest.raises(UsageError, match=name):
        kind(**{name: value})


@pytest.mark.parametrize("weight", ["inf", "nan", "1e308", "0", "-1"])
def test_a_weight_that_no_epoch_can_have_is_refused(weight):
    with pytest.raises(UsageError, match=r"(?i)weight"):
        SourceConfig.parse(f"data@{weight}")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://***@bucket/run"),
        ("https://host/a?x=1&token=abc&sig=d", "https://host/a?x=1&token=***&sig=***"),
        ("https://h/a?X-Amz-Signature=0123&y=2", "https://h/a?X-Amz-Signature=***&y=2"),
        ("s3://user@bucket/run", "s3://user@bucket/run"),
        ("/data/a:b@0.5", "/data/a:b@0.5"),
    ],
)
def test_passwords_in_urls_are_written_nowhere(url, shown):
    assert hide_secrets(url) == shown
    assert to_dict(RunConfig(mirror=url))["mirror"] == shown
