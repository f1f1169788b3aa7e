"""What fine-tuning starts from, and what of it changes."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from diptych.checkpoint import layouts
from diptych.config import from_dict, to_dict
from diptych.errors import NotFoundError, UsageError
from diptych.model.clip import CLIP
from diptych.train import loop
from diptych.train.config import StartConfig, TrainConfig
from diptych.train.finetune.start import choose_lr_scales, lock
from diptych.train.optim import build_optimizer
from diptych.train.recipe import FINETUNE
from samples import SMALL_VOCABULARY, TINY_RESNET, TINY_VIT, make_loaded, small, train_config, write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small model whose preprocessing and tokenizer are not the usual ones."""
    folder = tmp_path_factory.mktemp("start") / "model"
    loaded = make_loaded(small(TINY_VIT), mean=(0.5, 0.5, 0.5), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    layouts.save(loaded, folder)
    return folder


def tune(data, out, model, **changes):
    config = train_config(data, out, model=layouts.open_checkpoint(model).config, start_model=str(model), **changes)
    return loop.run(config)


def test_preprocessing_and_tokenizer_of_the_start_are_kept(data, start, tmp_path):
    tune(data, tmp_path / "run", start, steps=2, warmup=0)
    before, after = layouts.load(start), layouts.load(tmp_path / "run")
    assert after.preprocess == before.preprocess
    assert after.tokenizer == before.tokenizer == SMALL_VOCABULARY
    assert not torch.equal(after.model.visual.proj, before.model.visual.proj)


def test_without_a_step_nothing_has_changed(data, start, tmp_path):
    seen = []
    config = train_config(data, tmp_path / "run", model=small(TINY_VIT), start_model=str(start), steps=2, warmup=0)

    def evaluator(model: CLIP):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"a/acc1": 0.5}

    loop.run(config, evaluators=[evaluator])
    for name, tensor in layouts.load(start).model.state_dict().items():
        assert torch.equal(seen[0][name], tensor), name


@pytest.mark.parametrize(("name", "prefix"), [("image", "visual."), ("text", "text.")])
@pytest.mark.parametrize("model", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_a_locked_tower_keeps_every_bit_and_has_no_optimizer_state(data, tmp_path, name, prefix, model):
    layouts.save(make_loaded(model), tmp_path / "start")
    tune(data, tmp_path / "run", tmp_path / "start", steps=2, warmup=0, start={"lock": name})
    before, after = (
        layouts.load(tmp_path / "start").model.state_dict(),
        layouts.load(tmp_path / "run").model.state_dict(),
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not any(key.startswith(prefix) for key in changed)
    stored = load_file(tmp_path / "run/step_00000002/training.safetensors")
    assert any(key.startswith("exp_avg.") for key in stored)
    assert not any(f".{prefix}" in f".{key.partition('.')[2]}" for key in stored)


def test_statistics_of_batchnorm_stay_as_they_were(data, tmp_path):
    layouts.save(make_loaded(TINY_RESNET), tmp_path / "start")
    tune(data, tmp_path / "run", tmp_path / "start", steps=2, warmup=0)
    before, after = layouts.load(tmp_path / "start").model, layouts.load(tmp_path / "run").model
    assert torch.equal(before.visual.bn1.running_mean, after.visual.bn1.running_mean)
    assert not torch.equal(before.visual.bn1.weight, after.visual.bn1.weight)


def test_layers_learn_at_rates_of_this_table():
    model = CLIP(small(dataclasses.replace(TINY_VIT, text=dataclasses.replace(TINY_VIT.text, layers=1))))
    scales = choose_lr_scales(CLIP(TINY_VIT), 0.5)
    table = {
        "logit_scale": 1,
        "visual.proj": 1,
        "visual.ln_post.weight": 1,
        "visual.transformer.resblocks.1.attn.in_proj.weight": 0.5,
        "visual.transformer.resblocks.1.ln_2.bias": 0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 0.25,
        "visual.ln_pre.weight": 0.125,
        "visual.conv1.weight": 0.125,
        "visual.class_embedding": 0.125,
        "visual.positional_embedding": 0.125,
        "text.text_projection": 1,
        "text.ln_final.bias": 1,
        "text.transformer.resblocks.1.mlp.c_proj.bias": 0.5,
        "text.transformer.resblocks.0.ln_1.weight": 0.25,
        "text.token_embedding.weight": 0.125,
        "text.positional_embedding": 0.125,
    }
    assert {name: scales[name] for name in table} == table
    assert scales.keys() == dict(CLIP(TINY_VIT).named_parameters()).keys()
    assert choose_lr_scales(model, 0.5)["text.token_embedding.weight"] == 0.25  # one layer above it


def test_stages_of_a_resnet_learn_at_rates_of_this_table():
    scales = choose_lr_scales(CLIP(TINY_RESNET), 0.5)
    table = {
        "visual.attnpool.q_proj.weight": 1,
        "visual.layer4.0.conv1.weight": 0.5,
        "visual.layer3.0.bn1.bias": 0.25,
        "visual.layer2.0.conv3.weight": 0.125,
        "visual.layer1.0.downsample.0.weight": 0.0625,
        "visual.conv1.weight": 0.03125,
        "visual.bn3.weight": 0.03125,
    }
    assert {name: scales[name] for name in table} == table


def test_groups_of_the_optimizer_hold_every_trained_weight_once_at_its_rate():
    model = CLIP(TINY_VIT)
    lock(model, StartConfig(lock="image"))
    scales = choose_lr_scales(model, 0.5)
    optimizer = build_optimizer(model, FINETUNE.optim, scales)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert found == scales
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(scales)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_a_step_moves_each_layer_at_its_rate(data, start, tmp_path):
    """Adam's first steps move every weight by the learning rate, whatever the gradient."""
    tune(data, tmp_path / "run", start, steps=2, warmup=0, lr=1e-3, start={"layer_decay": 0.1})
    before, after = layouts.load(start).model, layouts.load(tmp_path / "run").model
    moved = [
        (after.state_dict()[name] - before.state_dict()[name]).abs().max().item()
        for name in ("visual.proj", "visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.conv1.weight")
    ]
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.3)
    assert moved[1] == pytest.approx(10 * moved[2], rel=0.3)


def test_a_run_goes_on_when_its_start_has_gone(data, tmp_path):
    layouts.save(make_loaded(TINY_VIT), tmp_path / "start")
    config = train_config(
        data, tmp_path / "run", start_model=str(tmp_path / "start"), steps=4, checkpoint_every=2, warmup=0
    )
    loop.run(config)
    (tmp_path / "run/step_00000004/model.safetensors").unlink()
    for file in (tmp_path / "start").iterdir():
        file.unlink()
    (tmp_path / "start").rmdir()
    assert loop.run(config).resumed_from == 2


def test_a_warmup_is_a_tenth_of_the_run_at_most(data, start, tmp_path):
    config = train_config(
        data, tmp_path / "run", model=small(TINY_VIT), start_model=str(start), steps=20, warmup=500, lr=1e-3
    )
    rates = []
    loop.run(config, on_step=lambda report: rates.append(report.lr))
    assert rates[:3] == [0.5e-3, 1e-3, 1e-3]


def test_configs_from_before_fine_tuning_are_read(data, tmp_path):
    stored = to_dict(train_config(data, tmp_path))
    del stored["start"], stored["start_model"], stored["loader"]["augment"]
    assert from_dict(TrainConfig, stored) == train_config(data, tmp_path)


def test_what_cannot_be_is_said_in_three_parts(data, start, tmp_path):
    with pytest.raises(NotFoundError, match=r"gone"):
        loop.run(train_config(data, tmp_path / "run", start_model=str(tmp_path / "gone")))
    with pytest.raises(NotFoundError, match=r"no such dataset: .*a folder of \.tar shards, one \.tar"):
        tune(tmp_path / "nowhere", tmp_path / "run", start)
    with pytest.raises(UsageError, match=r"layer_decay 2.0 is not a share in \(0, 1\]; 1 is the same rate for all"):
        StartConfig(layer_decay=2.0)
    with pytest.raises(UsageError, match=r"belong to fine-tuning; name a start_model"):
        train_config(data, tmp_path, start={"lock": "image"})
    with pytest.raises(UsageError, match=r"cropped at random; add --no-augment"):
        train_config(data, tmp_path, start_model="x", start={"lock": "image", "cache_features": "on"})
    with pytest.raises(UsageError, match=r"cache_features on needs a tower that does not change; add --lock"):
        StartConfig(cache_features="on")
    with pytest.raises(UsageError, match=r"--sharding ddp"):
        train_config(data, tmp_path, start_model="x", start={"lora_rank": 2}, sharding="fsdp")
    with pytest.raises(UsageError, match=r"lora_rank 0 must be at least 1; 8 is usual"):
        StartConfig(lora_rank=0)
