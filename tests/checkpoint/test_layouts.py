import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.checkpoint import layouts
from diptych.checkpoint.formats import conventions, native, open_clip, open_clip_config, transformers
from diptych.checkpoint.weights import archive
from diptych.checkpoint.weights.read import read_tensor_file
from diptych.errors import ActivationUnknownError, CheckpointError, NotFoundError, UsageError
from diptych.model.config import ViTConfig, check_activation, get_preset
from diptych.tokenizer import Tokenizer
from samples import SMALL_VOCABULARY, TINY_RESNET, TINY_VIT, make_loaded, small

VIT, RESNET = small(TINY_VIT), small(TINY_RESNET)
STOCK = replace(TINY_VIT, text=replace(TINY_VIT.text, width=64, heads=1), vision=VIT.vision)  # OpenAI's vocabulary


def same_weights(a, b):
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers", "openai"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("config", [STOCK, replace(RESNET, text=STOCK.text)], ids=["vit", "resnet"])
def test_a_model_comes_back_the_same_from_every_layout_that_can_hold_it(tmp_path, layout, activation, config):
    loaded = make_loaded(replace(config, activation=activation))
    if (layouts.LAYOUTS[layout].why_not(loaded)) is not None:
        with pytest.raises(UsageError, match=r"cannot hold this model: .*(GELU|no ResNet)"):
            layouts.save(loaded, tmp_path / "out", layout)
        assert list(tmp_path.iterdir()) == []
        return
    assert layouts.convert(loaded, tmp_path / "out", layout) == {"image": 0, "text": 0}
    back = layouts.load(tmp_path / "out", activation=activation if layout == "openai" else None)
    assert back.model.config == loaded.model.config
    assert (back.preprocess, back.tokenizer) == (loaded.preprocess, loaded.tokenizer)
    assert same_weights(back, loaded)
    assert not back.model.training


def test_transformers_folders_hold_a_vocabulary_of_ones_own(tmp_path):
    loaded = make_loaded(VIT)
    layouts.convert(loaded, tmp_path / "out", "transformers")
    assert layouts.load(tmp_path / "out").tokenizer == SMALL_VOCABULARY
    record = json.loads((tmp_path / "out/config.json").read_text())
    assert record["text_config"]["eos_token_id"] == 519


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.parametrize("resize", ["shorter_side", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_other_preprocessing_travels_where_a_layout_can_say_it(tmp_path, layout, resize, interpolation):
    loaded = make_loaded(
        STOCK, resize=resize, interpolation=interpolation, mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 0.125)
    )
    layouts.convert(loaded, tmp_path / "out", layout)
    assert layouts.load(tmp_path / "out").preprocess == loaded.preprocess


def odd(**changes):
    """A ViT of other heads and MLPs than the paper's rule."""
    vision = ViTConfig(image_size=28, patch_size=14, width=40, layers=1, heads=2, **changes)
    return replace(STOCK, vision=vision, text=replace(STOCK.text, width=48, heads=3))


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers"])
@pytest.mark.parametrize("mlp_width", [160, 174, 175])
def test_other_heads_and_mlps_travel_too(tmp_path, layout, mlp_width):
    loaded = make_loaded(odd(mlp_ratio=mlp_width / 40))
    assert layouts.convert(loaded, tmp_path / "out", layout) == {"image": 0, "text": 0}
    assert layouts.load(tmp_path / "out").model.config.vision.mlp_width == mlp_width


def test_the_ratio_that_open_clip_multiplies_and_cuts_gives_the_width_back():
    for width in range(8, 2000, 8):
        for mlp_width in (4 * width - 1, 4 * width + 1, round(width * 4.3637), round(width * 4.9231), 3 * width + 7):
            config = ViTConfig(image_size=14, patch_size=14, width=width, heads=1, mlp_ratio=mlp_width / width)
            assert int(width * open_clip_config._exact_ratio(config)) == mlp_width


@pytest.mark.parametrize(
    ("layout", "config", "changes", "reason"),
    [
        ("openai", replace(STOCK, activation="gelu"), {}, "GELU"),
        ("openai", odd(), {}, "64 channels a head"),
        ("openai", replace(STOCK, vision=replace(STOCK.vision, mlp_ratio=2.0)), {}, "MLP"),
        ("openai", STOCK, {"mean": (0.5, 0.5, 0.5)}, "preprocessing"),
        ("openai", VIT, {}, "vocabulary"),
        ("open_clip", VIT, {}, "vocabulary"),
        ("transformers", RESNET, {}, "no ResNet image tower"),
        ("openai", replace(STOCK, vision=replace(STOCK.vision, stem="conv")), {}, "not the paper's: stem conv"),
        ("open_clip", replace(STOCK, vision=replace(STOCK.vision, stem="conv")), {}, "only diptych has"),
        ("transformers", replace(STOCK, vision=replace(STOCK.vision, stem="conv")), {}, "not the paper's: stem conv"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_with_the_reason(tmp_path, layout, config, changes, reason):
    with pytest.raises(UsageError, match=reason):
        layouts.save(make_loaded(config, **changes), tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "most"), [("float16", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers", "openai"])
def test_a_lower_precision_is_written_and_its_rounding_told(tmp_path, layout, precision, most):
    differences = layouts.convert(make_loaded(STOCK), tmp_path / "out", layout, precision=precision)
    assert all(0 < difference < most for difference in differences.values())
    opened = layouts.open_checkpoint(tmp_path / "out", activation="quick_gelu")
    assert set(opened.weights.dtypes) == {getattr(torch, precision)}
    kept = layouts.load(tmp_path / "out", activation="quick_gelu", dtype=getattr(torch, precision))
    assert kept.model.dtype == getattr(torch, precision)
    features = kept.model.encode_image(torch.zeros(1, 3, 32, 32))
    assert features.dtype == kept.model.dtype
    assert layouts.load(tmp_path / "out", activation="quick_gelu").model.dtype == torch.float32


def test_a_conversion_that_comes_out_differently_leaves_nothing_behind(tmp_path, monkeypatch):
    def forget(folder, loaded):
        with torch.no_grad():
            loaded.model.visual.proj.add_(1)
        native.write(folder, loaded)
        with torch.no_grad():
            loaded.model.visual.proj.sub_(1)

    broken = replace(layouts.LAYOUTS["diptych"], write=forget)
    monkeypatch.setattr(layouts, "LAYOUTS", {"diptych": broken})
    with pytest.raises(CheckpointError, match="was not written: image features differ by"):
        layouts.convert(make_loaded(VIT), tmp_path / "out", "diptych")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_unless_asked_and_never_a_folder_of_something_else(tmp_path):
    loaded = make_loaded(VIT)
    layouts.save(loaded, tmp_path / "out")
    with pytest.raises(UsageError, match="exists; name another place, or --overwrite"):
        layouts.save(loaded, tmp_path / "out")
    layouts.save(loaded, tmp_path / "out", "transformers", overwrite=True)
    assert not (tmp_path / "out" / native.DESCRIPTION).exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds no checkpoint, and is not overwritten"):
        layouts.save(loaded, tmp_path / "photos", overwrite=True)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file"):
        layouts.save(loaded, tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="unknown layout 'opencilp'"):
        layouts.save(loaded, tmp_path / "new", "opencilp")


# --- names and wrappers ---------------------------------------------------------------------------------------------


def bare(tmp_path, state, name="weights.pt"):
    SMALL_VOCABULARY.save(tmp_path)
    torch.save(state, tmp_path / name)
    return tmp_path / name


def openai_state(loaded):
    return conventions.openai_state(loaded.model.state_dict().items())


WRAPPERS = {
    "plain": lambda s: s,
    "ddp": lambda s: {f"module.{n}": t for n, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "compiled ddp": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "lightning": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "epoch": 1},
    "part of another module": lambda s: {f"net.clip_model.module.{n}": t for n, t in s.items()},
    "compiled tower": lambda s: {n.replace("visual.", "visual._orig_mod."): t for n, t in s.items()},
    "custom text": lambda s: {n if n.startswith(("visual", "logit")) else f"text.{n}": t for n, t in s.items()},
    "open_clip training": lambda s: {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{n}": t for n, t in s.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}]},
    },
    "model_state_dict": lambda s: {"model_state_dict": s, "args": {"lr": 0.1}},
    "tensors beside it": lambda s: {"rng_state": torch.zeros(3), "state_dict": s, "logit_scale": torch.tensor(0.0)},
    "openai extras": lambda s: {
        **s,
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(16),
        "vocab_size": torch.tensor(520),
        "attn_mask": torch.zeros(16, 16),
    },
    "vector scale": lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1)},
    "parameters": lambda s: {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()},
    "views of one storage": lambda s: dict(zip(s, one_storage(list(s.values())), strict=True)),
    "transposed views": lambda s: {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in s.items()},
    "half": lambda s: {n: t.half().float().half() if t.is_floating_point() else t for n, t in s.items()},
    "double": lambda s: {n: t.double() if t.is_floating_point() else t for n, t in s.items()},
}


def one_storage(tensors):
    flat = torch.cat([tensor.float().reshape(-1) for tensor in tensors])
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_dicts_are_read_in_whatever_training_wrapped_them(tmp_path, wrapper):
    loaded = make_loaded(VIT)
    if wrapper == "half":
        loaded.model.half().float()
    path = bare(tmp_path, WRAPPERS[wrapper](openai_state(loaded)))
    back = layouts.load(path, activation="quick_gelu")
    assert same_weights(back, loaded)
    assert layouts.open_checkpoint(path, activation="quick_gelu").layout == "state dict"


def test_names_of_no_clip_are_told_as_they_are_in_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"projection is missing from its 1 tensors \(encoder\.weight, \.\.\.\)"):
        layouts.load(bare(tmp_path, {"encoder.weight": torch.zeros(2)}), activation="gelu")
    two = {f"{who}.{n}": t for who in ("student", "teacher") for n, t in openai_state(make_loaded(VIT)).items()}
    with pytest.raises(CheckpointError, match=r"text_projection is missing .*student\.ln_final"):
        layouts.load(bare(tmp_path, two), activation="gelu")
    head = {f"model.{n}": t for n, t in openai_state(make_loaded(VIT)).items()} | {"head.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 unexpected \(head\.weight\)"):
        layouts.load(bare(tmp_path, head), activation="gelu")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_of_long_clips_two_tables_of_positions_the_right_rows_are_read(tmp_path, suffix):
    config = replace(VIT, text=replace(VIT.text, context_length=40))
    loaded = make_loaded(config, Tokenizer(SMALL_VOCABULARY.merges, context_length=40))
    kept, rest = torch.randn(40, 64), torch.randn(40, 64)
    state = openai_state(loaded) | {"positional_embedding": kept, "positional_embedding_res": rest}
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pt" else save_file)(state, path)
    loaded.tokenizer.save(tmp_path)
    back = layouts.load(path, activation="quick_gelu").model
    text, mask = loaded.tokenizer(["the cat and the can " * 4, "cat"]), torch.arange(40)[:, None] < 20
    with torch.inference_mode():
        loaded.model.text.positional_embedding.copy_(kept * mask + rest * ~mask)
        assert torch.equal(back.encode_text(text), loaded.model.encode_text(text))
    torch.save(state | {"positional_embedding_res": rest[:30]}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="are not two tables of LongCLIP's positions"):
        layouts.load(tmp_path / "odd.pt", activation="quick_gelu")


def test_a_bias_for_the_sigmoid_loss_travels_in_open_clips_layout_and_in_bare_files(tmp_path):
    loaded = make_loaded(replace(STOCK, activation="gelu", logit_bias=True))
    assert loaded.model.logit_bias != 0
    layouts.convert(loaded, tmp_path / "m", "open_clip")
    path = tmp_path / "m" / open_clip.CONFIG
    assert json.loads(path.read_text())["model_cfg"]["init_logit_bias"] == -10
    assert same_weights(layouts.load(tmp_path / "m"), loaded)
    edit(path, lambda record: record["model_cfg"].pop("init_logit_bias"))  # what open_clip_train leaves behind
    assert same_weights(layouts.load(tmp_path / "m"), loaded)
    vector = openai_state(loaded) | {"logit_bias": loaded.model.logit_bias.detach().reshape(1)}
    torch.save({"state_dict": {f"module.{n}": t for n, t in vector.items()}}, tmp_path / "epoch_1.pt")
    assert same_weights(layouts.load(tmp_path / "epoch_1.pt", activation="gelu"), loaded)
    with pytest.raises(UsageError, match="its logits have a bias"):
        layouts.save(loaded, tmp_path / "t", "transformers")


def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(tmp_path):
    for device in ("nonsense", "cpu:7"):
        with pytest.raises(UsageError, match=f"no device '{device}' here"):
            layouts.load(tmp_path / "none", device=device)
    layouts.save(make_loaded(VIT), tmp_path / "m")
    assert layouts.load(tmp_path / "m", device="auto").model.logit_scale.device.type in ("cpu", "cuda", "mps", "xpu")


def test_a_resnet_without_counters_gets_them(tmp_path):
    loaded = make_loaded(RESNET)
    state = {n: t for n, t in openai_state(loaded).items() if "num_batches_tracked" not in n}
    assert same_weights(layouts.load(bare(tmp_path, state), activation="gelu"), loaded)


def test_safetensors_without_a_config_are_a_bare_file_too(tmp_path):
    loaded = make_loaded(VIT)
    SMALL_VOCABULARY.save(tmp_path)
    save_file(openai_state(loaded), tmp_path / "x.safetensors")
    assert same_weights(layouts.load(tmp_path / "x.safetensors", activation="gelu"), loaded)


def test_a_bare_file_under_transformers_names_is_understood(tmp_path):
    loaded = make_loaded(VIT)
    transformers.write(tmp_path, loaded)
    (tmp_path / "model.safetensors").rename(tmp_path / "bare.safetensors")
    SMALL_VOCABULARY.save(tmp_path)
    opened = layouts.open_checkpoint(tmp_path / "bare.safetensors", activation="gelu")
    assert opened.layout == "transformers weights"
    assert same_weights(layouts.load(tmp_path / "bare.safetensors", activation="gelu"), loaded)


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
    state = openai_state(make_loaded(VIT))
    path = bare(tmp_path, state | {"module.logit_scale": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match="holds logit_scale twice"):
        layouts.load(path, activation="gelu")


def test_a_file_of_weights_is_read_with_the_config_beside_it(tmp_path):
    layouts.save(make_loaded(replace(STOCK, activation="gelu")), tmp_path / "m", "open_clip")
    opened = layouts.open_checkpoint(tmp_path / "m" / open_clip.WEIGHTS[0])
    assert (opened.layout, opened.config.activation) == ("open_clip", "gelu")


def test_of_several_files_the_one_that_was_named_is_read(tmp_path):
    one, two, three = (make_loaded(STOCK, seed=seed) for seed in (1, 2, 3))
    layouts.save(one, tmp_path / "m", "open_clip")
    torch.save(openai_state(two), tmp_path / "m" / "open_clip_pytorch_model.bin")
    layouts.save(three, tmp_path / "t", "transformers")
    for file in (tmp_path / "t").iterdir():
        file.rename(tmp_path / "m" / file.name)
    assert same_weights(layouts.load(tmp_path / "m"), one)
    assert same_weights(layouts.load(tmp_path / "m/open_clip_pytorch_model.bin"), two)
    assert same_weights(layouts.load(tmp_path / "m/model.safetensors"), three)


def test_a_model_in_training_or_half_precision_is_converted_as_it_is_used(tmp_path):
    loaded = make_loaded(replace(RESNET, text=STOCK.text))
    before = loaded.model.visual.bn1.running_mean.clone()
    loaded.model.train()
    assert layouts.convert(loaded, tmp_path / "a", "open_clip") == {"image": 0, "text": 0}
    assert loaded.model.training
    assert torch.equal(loaded.model.visual.bn1.running_mean, before)
    half = layouts.load(tmp_path / "a", dtype=torch.bfloat16)
    assert layouts.convert(half, tmp_path / "b", "diptych") == {"image": 0, "text": 0}
    assert set(layouts.open_checkpoint(tmp_path / "b").weights.dtypes) == {torch.float32}


# --- evidence for the activation ------------------------------------------------------------------------------------


def test_a_bare_file_that_does_not_say_gets_an_error_that_names_the_two_choices(tmp_path):
    path = bare(tmp_path, openai_state(make_loaded(VIT)))
    with pytest.raises(ActivationUnknownError, match=r"activation='quick_gelu'.*or activation='gelu'"):
        layouts.load(path)
    with pytest.raises(UsageError, match="unknown activation 'relu'"):
        check_activation("relu")
    for activation in ("quick_gelu", "gelu"):
        assert layouts.load(path, activation=activation).model.config.activation == activation


def test_an_open_clip_config_without_quick_gelu_means_gelu_as_in_open_clip(tmp_path):
    layouts.save(make_loaded(STOCK), tmp_path / "m", "open_clip")
    record = json.loads((tmp_path / "m" / open_clip.CONFIG).read_text())
    del record["model_cfg"]["quick_gelu"]
    (tmp_path / "m" / open_clip.CONFIG).write_text(json.dumps(record))
    opened = layouts.open_checkpoint(tmp_path / "m")
    assert opened.config.activation == "gelu"
    assert "means GELU in OpenCLIP" in opened.evidence["activation"]


def test_the_caller_may_overrule_a_config_and_the_evidence_says_so(tmp_path):
    for layout in ("diptych", "open_clip", "transformers"):
        layouts.save(make_loaded(STOCK), tmp_path / layout, layout)
        opened = layouts.open_checkpoint(tmp_path / layout, activation="gelu")
        assert (opened.config.activation, opened.evidence["activation"]) == ("gelu", "given by the caller")


def test_two_activations_in_a_transformers_config_are_refused(tmp_path):
    layouts.save(make_loaded(STOCK), tmp_path / "m", "transformers")
    record = json.loads((tmp_path / "m/config.json").read_text())
    record["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "m/config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"hidden_act is \['gelu', 'quick_gelu'\]"):
        layouts.load(tmp_path / "m")


# --- transformers' corners ------------------------------------------------------------------------------------------


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def transformers_folder(tmp_path, change=None, config=STOCK):
    loaded = make_loaded(config)
    layouts.save(loaded, tmp_path / "m", "transformers")
    if change is not None:
        edit(tmp_path / "m/config.json", change)
    return loaded, tmp_path / "m"


def test_the_old_eos_token_id_of_2_is_understood_and_any_other_refused(tmp_path):
    loaded, folder = transformers_folder(tmp_path, lambda c: c["text_config"].update(eos_token_id=2))
    assert same_weights(layouts.load(folder), loaded)
    edit(folder / "config.json", lambda c: c["text_config"].update(eos_token_id=7))
    with pytest.raises(CheckpointError, match="eos_token_id is 7"):
        layouts.load(folder)


def test_the_old_config_dict_wins_with_its_defaults_as_in_transformers(tmp_path):
    def old(config):
        config["text_config_dict"] = config.pop("text_config")
        config["text_config"] = {"hidden_size": 7}

    loaded, folder = transformers_folder(tmp_path, old)
    assert layouts.load(folder).model.config == loaded.model.config


def test_another_layer_norm_epsilon_is_refused(tmp_path):
    _, folder = transformers_folder(tmp_path, lambda c: c["vision_config"].update(layer_norm_eps=1e-6))
    with pytest.raises(CheckpointError, match="layer_norm_eps is 1e-06"):
        layouts.load(folder)


def test_position_ids_of_old_files_are_ignored(tmp_path):
    loaded, folder = transformers_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors")
    assert same_weights(layouts.load(folder), loaded)


def test_a_bin_file_and_shards_are_read(tmp_path):
    loaded, folder = transformers_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert same_weights(layouts.load(folder), loaded)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: state[name] for name in some}, folder / file)
    weight_map = {name: file for file, some in shards.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(layouts.load(folder), loaded)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="model-00002-of-00002"):
        layouts.load(folder)


def test_a_tensor_that_clip_has_not_is_named(tmp_path):
    _, folder = transformers_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"vision_model.head.probe": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_model\.head\.probe, which CLIPModel has not"):
        layouts.load(folder)


def test_a_tokenizer_json_alone_is_enough_and_a_foreign_tokenizer_is_refused(tmp_path):
    _, folder = transformers_folder(tmp_path, config=VIT)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = [merge.split(" ") for merge in SMALL_VOCABULARY.merges]
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    assert layouts.load(folder).tokenizer == SMALL_VOCABULARY
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="XLMRobertaTokenizer"))
    with pytest.raises(CheckpointError, match="names the tokenizer XLMRobertaTokenizer"):
        layouts.load(folder)


def test_what_transformers_writes_for_the_released_vocabulary_is_the_released_files(tmp_path):
    import hashlib

    _, folder = transformers_folder(tmp_path)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert len(vocabulary) == 49408
    assert vocabulary["<|endoftext|>"] == 49407
    assert vocabulary["cat</w>"] == 2368
    # merges.txt of openai/clip-vit-base-patch32, byte for byte
    digest = hashlib.sha256((folder / "merges.txt").read_bytes()).hexdigest()
    assert digest == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


# --- what does not belong to the family -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}, "timm has no model"),
        ("text_cfg", {"hf_model_name": "somebody/encoder"}, "hf_model_name"),
        ("text_cfg", {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "all"}}, "clean"),
        ("text_cfg", {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}, "needs a tokenizer.json"),
        ("text_cfg", {"text_arch": "modern"}, "text_arch = modern"),
        ("text_cfg", {"pool_type": "mean"}, "pool_type = mean"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type = avg"),
        ("vision_cfg", {"attentional_pool": "parallel"}, "attentional_pool"),
        ("vision_cfg", {"attentional_pool": True}, "attn_pool.* missing|missing .*attn_pool"),
        ("vision_cfg", {"ls_init_value": 1e-5}, "ls_init_value"),
        ("vision_cfg", {"no_ln_pre": True}, "unexpected .*ln_pre"),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
        ("vision_cfg", {"image_size": [32, 64]}, "not square"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "longest"),
        ("preprocess_cfg", {"interpolation": "nearest"}, "nearest"),
        ("preprocess_cfg", {"size": 64}, "do not fit image_size 32"),
        ("preprocess_cfg", {"mean": [0.5, 0.5]}, "three numbers"),
    ],
)
def test_an_open_clip_config_of_another_family_is_refused_with_the_key(tmp_path, section, change, reason):
    layouts.save(make_loaded(STOCK), tmp_path / "m", "open_clip")

    def apply(record):
        model = record["model_cfg"]
        {"model_cfg": model, "preprocess_cfg": record["preprocess_cfg"], **model}[section].update(change)

    edit(tmp_path / "m" / open_clip.CONFIG, apply)
    with pytest.raises(CheckpointError, match=reason):
        layouts.load(tmp_path / "m")


def test_keys_that_change_nothing_are_accepted(tmp_path):
    loaded = make_loaded(STOCK)
    layouts.save(loaded, tmp_path / "m", "open_clip")

    def apply(record):
        record["model_cfg"] |= {"custom_text": True, "init_logit_scale": 2.6, "multimodal_cfg": None}
        record["model_cfg"]["vision_cfg"] |= {"patch_dropout": 0.5, "pool_type": "tok", "timm_model_name": None}
        record["model_cfg"]["text_cfg"] |= {"pad_id": 0, "pool_type": "argmax", "no_causal_mask": False}
        record["preprocess_cfg"] |= {"size": [32, 32], "mode": "RGB"}

    edit(tmp_path / "m" / open_clip.CONFIG, apply)
    assert same_weights(layouts.load(tmp_path / "m"), loaded)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("visual.trunk.blocks.0.norm1.weight", "timm"),
        ("logit_bias", r"logit_bias has shape \[2\], not \[\]"),
        ("classifier.weight", r"1 unexpected \(classifier\.weight\)"),
        ("text.transformer.embeddings.word_embeddings.weight", "Hugging Face"),
        ("text_decoder.cross_attn.0.ln_1.weight", "CoCa"),
        ("visual.attn_pool.query", "pools by attention"),
        ("visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
    ],
)
def test_bare_weights_of_another_family_are_refused_with_the_reason(tmp_path, name, reason):
    path = bare(tmp_path, openai_state(make_loaded(VIT)) | {name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=reason):
        layouts.load(path, activation="gelu")


def test_a_vocabulary_that_nobody_described_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(openai_state(make_loaded(VIT)), path)
    with pytest.raises(CheckpointError, match=r"vocabulary of 520 ids.*put its diptych_tokenizer\.json beside it"):
        layouts.load(path, activation="gelu")


# --- sizes from shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RN50", "RN50x64", "ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"])
def test_a_config_is_inferred_from_shapes_heads_by_the_preset_of_the_same_sizes(name, tmp_path):
    from diptych.checkpoint.formats.infer import infer_config
    from diptych.model.clip import CLIP

    preset = get_preset(name)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in CLIP(preset).state_dict().items()}
    config, _ = infer_config(shapes, preset.activation, None, tmp_path)
    assert config == preset
    bigger = {**shapes, "text.positional_embedding": (99, preset.text.width)}
    assert infer_config(bigger, preset.activation, None, tmp_path)[0].vision == preset.vision  # heads, after surgery


def test_where_shapes_do_not_tell_the_heads_an_architecture_is_asked_for(tmp_path):
    loaded = make_loaded(odd())
    path = tmp_path / "weights.pt"
    torch.save(openai_state(loaded), path)
    with pytest.raises(UsageError, match="does not say how many attention heads"):
        layouts.load(path, activation="gelu")


def test_a_preset_that_does_not_fit_is_an_error_that_names_a_shape(tmp_path):
    path = bare(tmp_path, openai_state(make_loaded(VIT)))
    with pytest.raises(CheckpointError, match="makes 16 tokens a text, the model takes 77"):
        layouts.load(path, activation="gelu", preset="ViT-B-32")


# --- TorchScript ----------------------------------------------------------------------------------------------------


class QuickGELU(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tree(torch.nn.Module):
    """Modules and tensors under given names, as a traced model keeps them."""

    def __init__(self, state, activation) -> None:
        super().__init__()
        for name, tensor in state.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            if tensor.is_floating_point():
                module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(last, tensor)
            if path[-1:] == ["c_fc"]:
                self.get_submodule(".".join(path[:-1])).gelu = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def no_deprecations():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("no_deprecations")
@pytest.mark.parametrize(("cls", "activation"), [(QuickGELU, "quick_gelu"), (torch.nn.GELU, "gelu")])
def test_a_torchscript_archive_shows_its_activation_by_the_classes_of_its_modules(tmp_path, cls, activation):
    loaded = make_loaded(replace(VIT, activation=activation))
    state = {n: t.half() if t.ndim > 1 else t for n, t in openai_state(loaded).items()}
    traced = torch.jit.trace(Tree(state, cls).eval(), torch.zeros(1))
    traced.save(tmp_path / "model.pt")
    SMALL_VOCABULARY.save(tmp_path)
    opened = layouts.open_checkpoint(tmp_path / "model.pt")
    assert (opened.layout, opened.config.activation) == ("TorchScript archive", activation)
    assert cls.__name__ in opened.evidence["activation"]
    back = layouts.load(tmp_path / "model.pt").model.state_dict()
    assert all(torch.equal(back[conventions.from_openai(n)], t.float()) for n, t in state.items())
    assert len(back) == len(state)


@pytest.mark.usefixtures("no_deprecations")
def test_a_torchscript_archive_without_known_classes_does_not_say(tmp_path):
    traced = torch.jit.trace(Tree(openai_state(make_loaded(VIT)), torch.nn.ReLU).eval(), torch.zeros(1))
    traced.save(tmp_path / "model.pt")
    SMALL_VOCABULARY.save(tmp_path)
    with pytest.raises(ActivationUnknownError):
        layouts.load(tmp_path / "model.pt")


def test_a_flipped_bit_in_an_archive_is_found_by_its_check_sum(tmp_path):
    path = bare(tmp_path, openai_state(make_loaded(VIT)))
    entry = read_tensor_file(path).entries["token_embedding.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"check sum of weights/data/\d+ does not fit"):
        archive.check_crc(path)


# --- agreement ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_or_preprocessing_that_does_not_fit_the_model_is_an_error(tmp_path):
    loaded = make_loaded(VIT)
    native.save(tmp_path / "ids", loaded._replace(tokenizer=Tokenizer.clip(16)))
    with pytest.raises(CheckpointError, match="tokenizer has 49408 ids, the model 520"):
        layouts.load(tmp_path / "ids")
    native.save(tmp_path / "length", loaded._replace(tokenizer=replace(SMALL_VOCABULARY, context_length=20)))
    with pytest.raises(CheckpointError, match="makes 20 tokens a text, the model takes 16"):
        layouts.load(tmp_path / "length")
    native.save(tmp_path / "size", loaded._replace(preprocess=replace(loaded.preprocess, image_size=64)))
    with pytest.raises(CheckpointError, match="takes pictures of 32 px, its preprocessing makes 64 px"):
        layouts.load(tmp_path / "size")


def test_a_folder_without_a_config_names_the_files_that_may_be_meant(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(NotFoundError, match=r"name one of its files: a\.pt"):
        layouts.load(tmp_path)


@pytest.mark.parametrize("theirs", ["thesis.txt", "step_00000100/model.safetensors", "notes/a.md", "train.py"])
def test_overwriting_replaces_a_model_and_nothing_of_anybody(tmp_path, theirs):
    loaded = make_loaded(VIT)
    layouts.save(loaded, tmp_path / "project")
    (tmp_path / "project" / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / "project" / theirs).write_text("mine")
    with pytest.raises(UsageError, match=f"holds more than a checkpoint .{theirs.split('/')[0]}"):
        layouts.save(loaded, tmp_path / "project", overwrite=True)
    assert (tmp_path / "project" / theirs).read_text() == "mine"
    (tmp_path / "link").symlink_to("project")
    with pytest.raises(UsageError, match="is a link"):
        layouts.save(loaded, tmp_path / "link", overwrite=True)


def test_a_model_is_written_for_whom_the_user_s_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        layouts.save(make_loaded(VIT), tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
