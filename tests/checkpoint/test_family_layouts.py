"""Models of later families through the doors that all models go through: layouts, architectures, surgery, training."""

import json
from dataclasses import replace

import pytest
import torch

from diptych.checkpoint import layouts, surgery
from diptych.checkpoint.architectures import find_architecture
from diptych.checkpoint.formats import timm
from diptych.checkpoint.loaded import Loaded
from diptych.checkpoint.sources import load_published
from diptych.config import from_dict, to_dict
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import NotFoundError, UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import PRESETS, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from diptych.tokenizer import Tokenizer
from diptych.tokenizer_json import read_tokenizer
from diptych.train.setup import fit_vocabulary
from samples import TINY_VIT
from test_tokenizer_json import write_family

SMALL = replace(
    timm.VITS["vit_base_patch16_siglip_224"], image_size=32, patch_size=8, width=64, layers=2, heads=2, activation=None
)


def make_siglip(folder, clean: str = "canonicalize") -> Loaded:
    """A small SigLIP of random weights with a vocabulary of its own."""
    tokenizer = read_tokenizer(folder, 12, **{**write_family(folder, "SigLIP"), "clean": clean})
    text = TextConfig(
        context_length=12, width=64, layers=2, heads=2, is_causal=False, pool="last", norm_eps=1e-6, projection="linear"
    )
    config = CLIPConfig(
        embed_dim=64,
        vision=SMALL,
        text=fit_vocabulary(text, tokenizer),
        activation="gelu_tanh",
        logit_bias=True,
    )
    torch.manual_seed(0)
    model = CLIP(config).eval()
    with torch.no_grad():
        model.logit_bias.fill_(-9.5)  # pyright: ignore[reportOptionalMemberAccess]
    return Loaded(model, Preprocess(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash"), tokenizer)


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers"])
def test_a_sigmoid_model_with_a_vocabulary_of_its_own_travels_with_its_bias(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "VITS", {"vit_small": replace(SMALL, activation="gelu_tanh")})
    loaded = make_siglip(tmp_path / "tokenizer")
    layouts.convert(loaded, tmp_path / "m", layout)
    again = layouts.load(tmp_path / "m")
    assert again.model.logit_bias.item() == -9.5
    assert again.tokenizer == loaded.tokenizer
    assert again.preprocess == loaded.preprocess
    texts = ["A cat, on a mat!", "two cats", "고양이 두 마리"]
    torch.testing.assert_close(embed_texts(again, texts), embed_texts(loaded, texts))
    pictures = [torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8).numpy()]
    torch.testing.assert_close(embed_images(again, pictures), embed_images(loaded, pictures))


def test_open_clip_and_transformers_find_their_own_words_for_a_sigmoid_model(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "VITS", {"vit_small": replace(SMALL, activation="gelu_tanh")})
    loaded = make_siglip(tmp_path / "tokenizer")
    layouts.save(loaded, tmp_path / "o", "open_clip")
    model = json.loads((tmp_path / "o" / "open_clip_config.json").read_text())["model_cfg"]
    assert model["vision_cfg"]["timm_model_name"] == "vit_small"
    assert model["vision_cfg"]["timm_proj"] == "none"
    assert model["text_cfg"]["tokenizer_kwargs"] == {"clean": "canonicalize"}
    assert model["text_cfg"]["act_kwargs"] == {"approximate": "tanh"}
    assert "init_logit_bias" in model
    layouts.save(loaded, tmp_path / "t", "transformers")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["model_type"] == "siglip"
    assert config["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    with pytest.raises(UsageError, match="always computes QuickGELU"):
        layouts.save(loaded, tmp_path / "x.pt", "openai")


def test_a_tower_that_sees_padding_gives_the_same_in_every_precision_and_batch(tmp_path):
    loaded = make_siglip(tmp_path / "tokenizer")
    texts = ["a cat", "the dog's hat on the mat", "two cats", ""]
    exact = embed_texts(loaded, texts)
    torch.testing.assert_close(torch.cat([embed_texts(loaded, [text]) for text in texts]), exact, rtol=0, atol=1e-6)
    for precision in ("float32", "bfloat16"):
        assert (embed_texts(loaded, texts, precision=precision) * exact).sum(dim=1).min() > 0.999


def test_pictures_and_texts_of_another_size_fit_after_surgery(tmp_path):
    loaded = make_siglip(tmp_path / "tokenizer")
    larger = surgery.resize_context(surgery.resize_image(loaded, 64), 20)
    assert larger.model.visual.positional_embedding.shape == (64, 64)
    assert larger.model.encode_image(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    assert larger.tokenizer(["a cat"]).shape == (1, 20)
    assert embed_texts(larger, ["a cat"]).isfinite().all()
    rotary = replace(TINY_VIT, vision=replace(TINY_VIT.vision, rotary_grid=4, rotary_start=1.0))
    turned = surgery.resize_image(
        Loaded(CLIP(rotary), Preprocess(image_size=32), Tokenizer.clip(16)), 64
    )  # angles as if the picture had been stretched to the grid that was trained on
    assert turned.model.config.vision.rotary_grid == 4
    assert turned.model.encode_image(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_what_a_config_does_not_say_is_the_papers_and_is_not_written():
    written, sizes = to_dict(TINY_VIT), {"width", "layers", "heads", "mlp_ratio"}
    assert set(written["vision"]) == {
        "type",
        "image_size",
        "patch_size",
        "width",
        "layers",
        "heads",
        "mlp_ratio",
        "stem",
    }
    assert set(written["text"]) == {"context_length", "vocab_size"} | sizes
    for tower in timm.VITS.values():
        assert from_dict(ViTConfig, to_dict(tower)) == tower


# --- architectures ---------------------------------------------------------------------------------------------------


def test_architectures_are_found_by_name():
    assert find_architecture("ViT-B-32") == PRESETS["ViT-B-32"]
    siglip = find_architecture("ViT-SO400M-14-SigLIP-384")
    assert siglip.vision == timm.VITS["vit_so400m_patch14_siglip_384"] or siglip.vision.pool == "latent"
    assert (siglip.vision.grid, siglip.embed_dim, siglip.text.context_length) == (27, 1152, 64)
    with pytest.raises(UsageError, match="did you mean ViT-B-16-SigLIP"):
        find_architecture("ViT-B-16-SigLiP")


def test_published_architectures_have_the_parameters_that_open_clip_counts():
    """CoCa's are counted without their caption decoder here."""
    for name, one in load_published().items():
        config = find_architecture(name.split("/")[0])
        ours = isinstance(config.vision, ViTConfig | ResNetConfig) and isinstance(config.text, TextConfig)
        if ours and not name.startswith("coca"):
            with torch.device("meta"):
                model = CLIP(config)
            assert sum(p.numel() for p in model.parameters()) == one.parameters, name


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_an_architecture_may_be_a_file(suffix, tmp_path):
    theirs = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
              "text_cfg": {"width": 64, "heads": 1, "layers": 2}}  # fmt: skip
    file = tmp_path / f"small.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(theirs))
    else:
        file.write_text("embed_dim = 24\n[vision_cfg]\nimage_size = 32\nlayers = 2\nwidth = 64\npatch_size = 8\n"
                        "[text_cfg]\nwidth = 64\nheads = 1\nlayers = 2\n")  # fmt: skip
    config = find_architecture(str(file))
    assert (config.vision.width, config.text.layers, config.activation) == (64, 2, "gelu")
    file.with_suffix(".json").write_text(json.dumps({"model_cfg": theirs}))
    assert find_architecture(str(file.with_suffix(".json"))) == config
    file.with_suffix(".json").write_text(json.dumps(to_dict(config)))
    assert find_architecture(str(file.with_suffix(".json"))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "it is no object"),
        ("{", "cannot be read"),
        ('{"vision_cfg": {}, "text_cfg": 3}', "it has no text_cfg"),
        ('{"vision_cfg": {"layers": "many"}, "text_cfg": {}}', "layers is many"),
        ('{"vision_cfg": {"timm_model_name": 3}, "text_cfg": {}}', "timm has no model|timm_model_name"),
        ('{"vision": {"type": "ViT"}}', "config type"),
        ('{"widht": 3}', "widht"),
        ('{"embed_dim": ' + "[" * 300 + "]" * 300 + "}", "cannot be read"),
    ],
)
def test_a_file_that_says_no_architecture_is_refused_in_one_line(text, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        find_architecture(str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(NotFoundError, match="no such architecture"):
        find_architecture(str(tmp_path / "other.json"))
