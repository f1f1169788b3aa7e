"""Towers that timm and transformers build: beside OpenCLIP's, through every layout, and refused where we cannot."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint import layouts, surgery
from diptych.checkpoint.formats import open_clip, open_clip_config
from diptych.checkpoint.loaded import Loaded, rebuild, why_not_paper
from diptych.config import from_dict, to_dict
from diptych.embed.texts import embed_texts
from diptych.errors import CheckpointError, UsageError
from diptych.image import Preprocess
from diptych.model import architectures, cost
from diptych.model.architectures import read_architecture, write_architecture
from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, TimmConfig, TransformersTextConfig
from diptych.model.inference.text import get_text_encoder
from diptych.model.inference.vision import get_encoder
from diptych.tokenizer_json import read_tokenizer
from diptych.train.finetune.start import choose_lr_scales
from golden.families import ENCODERS, FOREIGN, end_texts
from golden.weights import draw, inputs
from test_tokenizer_json import write_family

FEATURES = np.load(Path(__file__).parents[1] / "fixtures" / "families.npz")
HAS_TIMM = importlib.util.find_spec("timm") is not None
TEXTS = [name for name in FOREIGN if "hf_model_name" in FOREIGN[name]["text_cfg"]]
TRUNKS = [name for name in FOREIGN if name not in TEXTS]

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::timm")
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def small_encoders(monkeypatch):
    for name, settings in ENCODERS.items():
        monkeypatch.setitem(architectures.PUBLISHED, name, settings)


def build(name: str) -> CLIP:
    """A model whose tensors are drawn by the names that OpenCLIP has for them."""
    config = open_clip_config.read_config(FOREIGN[name], "gelu")
    model, weights = CLIP(config), {}
    for key, tensor in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            place = open_clip.find_place(key, config, "text.")
            drawn = [torch.from_numpy(np.asarray(draw(k, tuple(v.shape)))) for k, v in place.give(tensor).items()]
            weights[key] = place.take(drawn)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def draw_inputs(model: CLIP) -> tuple[Tensor, Tensor]:
    text = model.config.text
    pictures, tokens = inputs(model.config.vision.image_size, text.context_length, text.vocab_size)
    tokens = end_texts(tokens, {"vocab_size": text.vocab_size, "pad_id": text.pad_id})
    return torch.from_numpy(pictures), torch.from_numpy(tokens)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


@pytest.mark.parametrize("name", [*TEXTS, *(pytest.param(name, marks=needs_timm) for name in TRUNKS)])
@torch.inference_mode()
def test_features_are_open_clips(name):
    model = build(name)
    image, text = draw_inputs(model)
    assert distance(model.encode_image(image), torch.from_numpy(FEATURES[f"{name}/image"])) < 2e-6
    assert distance(model.encode_text(text), torch.from_numpy(FEATURES[f"{name}/text"])) < 2e-6


@pytest.mark.parametrize("name", [*TEXTS, *(pytest.param(name, marks=needs_timm) for name in TRUNKS)])
@torch.inference_mode()
def test_a_model_built_without_memory_computes_the_same(name):
    """Positions and other buffers that no checkpoint has are there."""
    model = build(name)
    again = rebuild(model.config, model.state_dict()).eval()
    assert not any(tensor.is_meta for tensor in [*again.buffers(), *again.parameters()])
    image, text = draw_inputs(model)
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    assert torch.equal(again.encode_text(text), model.encode_text(text))


@pytest.mark.parametrize("name", FOREIGN)
def test_a_config_that_is_written_is_read_as_the_same(name):
    config = open_clip_config.read_config(FOREIGN[name], "gelu")
    assert open_clip_config.why_not(config) is None
    assert from_dict(CLIPConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert "is a model of t" in str(why_not_paper(config))


@pytest.mark.parametrize("name", TEXTS)
@torch.inference_mode()
def test_padding_and_batches_change_nothing(name):
    model = build(name)
    _, text = draw_inputs(model)
    whole = model.text.encode(text)  # every token, padding too
    assert distance(model.encode_text(text), whole) < 2e-6
    assert distance(model.encode_text(text[:1]), whole[:1]) < 2e-6
    for precision, bound in (("exact", 1 - 1e-6), ("float32", 1 - 1e-6), ("bfloat16", 0.9995)):
        features = get_text_encoder(model.text, precision)(text)
        assert features.dtype == torch.float32
        assert F.cosine_similarity(features.double(), whole.double()).min() > bound
    assert get_text_encoder(model.text, "exact")(text[:0]).shape == (0, model.config.embed_dim)


@needs_timm
@pytest.mark.parametrize("name", TRUNKS)
@torch.inference_mode()
def test_every_precision_of_a_trunk_keeps_to_the_bound(name):
    model = build(name)
    size = model.config.vision.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = model.visual.pool((pixels / 255 - 0.5) / 0.5)
    for precision, bound in (("float32", 1 - 1e-6), ("bfloat16", 0.9995)):
        pooled = get_encoder(model.visual, precision, (0.5,) * 3, (0.5,) * 3)(pixels)
        assert F.cosine_similarity(pooled.double(), expected.double()).min() > bound
    with pytest.raises(UsageError, match="int8 is for Vision Transformers"):
        get_encoder(model.visual, "int8", (0.5,) * 3, (0.5,) * 3)


def test_gradients_reach_every_weight():
    model = build("RoBERTa")
    image, text = draw_inputs(model)
    output = model.train()(image, text)
    (output.image_features @ output.text_features.T * torch.randn(3, 3)).sum().backward()
    still = {key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0}
    assert still <= {"logit_scale", "text.transformer.embeddings.token_type_embeddings.weight"}


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def roberta(tmp_path) -> Loaded:
    """A model with a text tower of transformers and a real tokenizer."""
    arguments = write_family(tmp_path / "words", "RoBERTa")
    model = build("RoBERTa")
    return Loaded(model, Preprocess(image_size=32), read_tokenizer(tmp_path / "words", 12, **arguments))


@pytest.mark.parametrize("layout", ["diptych", "open_clip"])
def test_it_is_written_and_read(roberta, layout, tmp_path):
    differences = layouts.convert(roberta, tmp_path / "out", layout)
    assert max(differences.values()) == 0
    again = layouts.load(tmp_path / "out")
    assert again.model.config == roberta.model.config
    assert torch.equal(embed_texts(again, ["a cat", "two dogs"]), embed_texts(roberta, ["a cat", "two dogs"]))
    if layout == "diptych":
        half = layouts.load(tmp_path / "out", dtype=torch.bfloat16).model
        assert half.encode_text(again.tokenizer(["a cat"])).dtype == torch.bfloat16


def test_layouts_that_cannot_hold_it_say_why(roberta, tmp_path):
    with pytest.raises(UsageError, match="its text tower is a model of transformers"):
        layouts.save(roberta, tmp_path / "out", "transformers")
    other = replace(roberta.model.config.text, architecture=write_architecture({"model_type": "roberta"}))
    assert "by name" in str(open_clip_config.why_not(replace(roberta.model.config, text=other)))


@pytest.mark.parametrize("name", ["chinese_clip", "altclip"])
@torch.inference_mode()
def test_transformers_other_clips_are_read_and_written(name, tmp_path):
    import transformers

    prefix, family = {"chinese_clip": ("ChineseCLIP", "CLIPA"), "altclip": ("AltCLIP", "RoBERTa")}[name]
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    words = {**small, "vocab_size": 400, "max_position_embeddings": 90}
    words |= {"project_dim": 24} if name == "altclip" else {}
    model_class, config_class = (getattr(transformers, f"{prefix}{end}") for end in ("Model", "Config"))
    vision = {**small, "image_size": 32, "patch_size": 16}
    theirs = model_class(config_class(text_config=words, vision_config=vision, projection_dim=16)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    write_family(tmp_path / "theirs", family)
    size = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(size))

    loaded = layouts.load(tmp_path / "theirs")
    tokens, image = loaded.tokenizer(["a cat", "two dogs, and the cat"]), torch.randn(2, 3, 32, 32)
    seen = (tokens != loaded.tokenizer.pad_token_id).long()
    expected = theirs.get_text_features(tokens, attention_mask=seen).pooler_output
    assert distance(loaded.model.encode_text(tokens), expected) < 2e-6
    assert distance(loaded.model.encode_image(image), theirs.get_image_features(image).pooler_output) < 2e-6

    assert max(layouts.convert(loaded, tmp_path / "ours", "transformers").values()) < 1e-6
    back, found = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not [*found["missing_keys"], *found["unexpected_keys"]]
    assert distance(back.eval().get_text_features(tokens, attention_mask=seen).pooler_output, expected) < 2e-6


def test_variable_shapes_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(CheckpointError, match="variable shape"):
        layouts.open_checkpoint(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_texts_have_as_many_tokens_as_the_encoder_has_positions(roberta):
    shorter = surgery.resize_context(roberta, 8)
    short = ["a cat"]
    assert distance(embed_texts(shorter, short), embed_texts(roberta, short)) < 2e-6
    with pytest.raises(UsageError, match="18 positions"):
        surgery.resize_context(roberta, 19)


@needs_timm
def test_the_size_of_a_trunks_pictures_stays(roberta):
    loaded = roberta._replace(model=build("ConvNeXt"))
    with pytest.raises(UsageError, match="pictures of timm's convnext_base have one size, 64 px"):
        surgery.resize_image(loaded, 256)


def test_costs_are_not_known(roberta):
    with pytest.raises(UsageError, match="a text tower of transformers"):
        cost.text_tower(roberta.model.config, 9)
    with pytest.raises(UsageError, match="timm's convnext_base"):
        cost.image_tower(CLIPConfig(vision=TimmConfig(name="convnext_base")))


def test_layers_that_are_not_ours_have_no_decay(roberta):
    with pytest.raises(UsageError, match="those of this text tower are another library's"):
        choose_lr_scales(roberta.model, 0.5)
    assert set(choose_lr_scales(roberta.model, 1.0).values()) == {1.0}
    roberta.model.text.requires_grad_(False)
    assert 0.5 in choose_lr_scales(roberta.model, 0.5).values()


@pytest.mark.skipif(HAS_TIMM, reason="timm is installed")
def test_without_timm_the_extra_is_named():
    with pytest.raises(UsageError, match=r"'\.\[timm\]'"):
        CLIP(CLIPConfig(vision=TimmConfig(name="convnext_base")))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("text_cfg", {"hf_model_name": "somebody/encoder"}, "somebody/encoder, whose architecture is not known"),
        ("text_cfg", {"hf_pooler_type": "max_pooler"}, "hf_pooler_type"),
        ("text_cfg", {"hf_proj_type": None}, "no hf_proj_type"),
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}, "timm has no model"),
        ("vision_cfg", {"timm_model_name": "x", "timm_model_kwargs": {"checkpoint_path": "y"}}, "checkpoint_path"),
        ("vision_cfg", {"timm_model_name": "x", "timm_model_kwargs": {"depth": 1 << 20}}, "depth"),
        ("vision_cfg", {"timm_model_name": "x", "timm_model_kwargs": {"scriptable": []}}, "scriptable"),
        ("vision_cfg", {"timm_model_name": "x", "timm_proj": "conv"}, "timm_proj"),
    ],
)
def test_an_open_clip_config_of_something_else_is_refused_by_its_value(section, changes, message):
    config = {**FOREIGN["RoBERTa"], section: {**FOREIGN["RoBERTa"][section], **changes}}
    with pytest.raises((UsageError, ValueError), match=message):
        open_clip_config.read_config(config, "gelu")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"hidden_size": 10**9},
        {"hidden_size": 30, "num_attention_heads": 4},
        {"num_hidden_layers": 5000},
        {"max_position_embeddings": 1 << 20},
        {"layer_norm_eps": "1e-5"},
        {"pad_token_id": 10**6},
        {"hidden_act": "gelu" * 50},
    ],
)
def test_architectures_that_cannot_be_are_refused(changes):
    with pytest.raises(UsageError):
        TransformersTextConfig(architecture=write_architecture({"model_type": "roberta", **changes}))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"model_type": "roberta"}', '{"auto_map": {}}', "[" * 100_000])
def test_an_architecture_is_nothing_but_what_was_written(text):
    with pytest.raises(UsageError):
        read_architecture(text)


def test_a_folder_gives_the_architecture_of_an_unknown_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**ENCODERS["roberta-base"], "auto_map": {"AutoModel": "x.y"}}))
    config = FOREIGN["RoBERTa"]
    named = {**config, "text_cfg": {**config["text_cfg"], "hf_model_name": str(tmp_path)}}
    read = open_clip_config.read_config(named, "gelu")
    assert read == open_clip_config.read_config(config, "gelu")
