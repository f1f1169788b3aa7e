import math

import pytest
import torch

from diptych.model.clip import CLIP
from diptych.model.config import OPEN_CLIP_PRESETS, PAPER_PRESETS, SMALL_PRESETS, get_preset
from diptych.model.text import find_ends, longest
from diptych.model.transformer import Sight
from samples import TINY_RESNET, TINY_VIT

# spec: built from OpenAI's and OpenCLIP's code; parameters only, logit_scale in the total
PARAMETERS = {
    "RN50": (38_316_896, 63_690_240, 102_007_137),
    "RN101": (56_259_936, 63_428_096, 119_688_033),
    "RN50x4": (87_137_080, 91_163_520, 178_300_601),
    "RN50x16": (167_328_912, 123_650_304, 290_979_217),
    "RN50x64": (420_380_352, 202_877_952, 623_258_305),
    "ViT-B-32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B-16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L-14": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L-14-336": (304_293_888, 123_650_304, 427_944_193),
}

# open_clip 3.3.0, docs/model_profile.csv
OPEN_CLIP_MILLIONS = {
    "ViT-B-32-256": 151.29,
    "ViT-B-16-plus-240": 208.38,
    "ViT-L-16": 427.74,
    "ViT-L-14-280": 427.76,
    "ViT-H-14": 986.11,
    "ViT-H-14-378": 986.71,
    "ViT-g-14": 1366.68,
    "ViT-bigG-14": 2539.57,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_parameter_counts_are_the_papers_to_the_last_one(name):
    with torch.device("meta"):
        model = CLIP(get_preset(name))
    assert (count(model.visual), count(model.text), count(model)) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPEN_CLIP_PRESETS)
def test_parameter_counts_of_later_models_are_open_clips(name):
    with torch.device("meta"):
        model = CLIP(get_preset(name))
    assert count(model) / 1e6 == pytest.approx(OPEN_CLIP_MILLIONS[name], abs=0.006)


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_small_presets_compute_features(name):
    config = SMALL_PRESETS[name]
    size = config.vision.image_size
    output = CLIP(config).eval()(torch.randn(2, 3, size, size), torch.tensor([[1, 2, config.text.vocab_size - 1]] * 2))
    assert output.image_features.shape == output.text_features.shape == (2, config.embed_dim)


def tokens(*lengths: int, width: int = 16) -> torch.Tensor:
    """Rows of so many tokens, start and end included."""
    text = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, 49_000, (length,))
        row[length - 1] = 49_407
    return text


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET])
def test_forward_gives_normalised_features_and_the_scale(config):
    model = CLIP(config).eval()
    image, text = torch.randn(4, 3, 32, 32), tokens(3, 5, 16, 2)
    output = model(image, text)
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(output.text_features.norm(dim=-1), torch.ones(4))
    assert output.logit_scale.item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(torch.nn.functional.normalize(model.encode_image(image), dim=-1), output.image_features)


def encode_whole(model: CLIP, text: torch.Tensor) -> torch.Tensor:
    """The text tower as the paper has it: every token of every block, padding included."""
    tower = model.text
    x = tower.token_embedding(text) + tower.positional_embedding[: text.shape[1]]
    for block in tower.transformer.resblocks:
        x = block(x, Sight(is_causal=True))
    x = tower.ln_final(x)[torch.arange(len(text)), text.argmax(dim=-1)]
    return x @ tower.text_projection


def test_the_last_block_of_the_image_tower_computes_one_token_and_nothing_is_lost():
    model, rows = CLIP(TINY_VIT).double().eval(), []
    visual, image = model.visual, torch.randn(3, 3, 32, 32, dtype=torch.float64)
    x = visual.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(3, 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        x = block(x, Sight())
    visual.transformer.resblocks[-1].mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape))
    torch.testing.assert_close(visual(image), visual.ln_post(x[:, 0]) @ visual.proj, rtol=0, atol=1e-12)
    assert rows == [(3, 32)]


def test_cutting_behind_the_longest_end_token_changes_nothing():
    model = CLIP(TINY_VIT).double().eval()
    text = tokens(3, 5, 9)
    torch.testing.assert_close(model.encode_text(text), encode_whole(model, text), rtol=0, atol=1e-12)


def test_the_text_tower_never_computes_past_the_longest_end_token():
    model, lengths = CLIP(TINY_VIT), []
    model.text.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.encode_text(tokens(3, 7, 4))
    assert lengths == [7]


def test_a_batch_is_computed_in_groups_of_like_length_and_put_back_in_order():
    model, shapes = CLIP(TINY_VIT).double().eval(), []
    text = tokens(*torch.randint(2, 17, (300,)).tolist())
    expected = encode_whole(model, text)
    model.text.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
    torch.testing.assert_close(model.encode_text(text), expected, rtol=0, atol=1e-12)
    lengths = [length for _, length in shapes]
    assert [n for n, _ in shapes] == [75] * 4
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == 16


def test_text_may_be_cut_at_a_multiple():
    text = tokens(3, 9)
    assert [longest(find_ends(text, None), multiple) for multiple in (1, 4, 8, 16)] == [9, 12, 16, 16]
    assert longest(find_ends(text[:0], None), 4) is None


def test_a_text_feature_does_not_depend_on_its_neighbours():
    model = CLIP(TINY_VIT).double().eval()
    text = tokens(3, 12)
    torch.testing.assert_close(model.encode_text(text)[:1], model.encode_text(text[:1]), rtol=0, atol=1e-12)


def test_the_attention_pool_projects_one_query_only():
    pool, shapes = CLIP(TINY_RESNET).visual.attnpool, []
    pool.q_proj.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    pool(torch.randn(2, 128, 1, 1))
    assert shapes == [(2, 128)]


def test_initialisation_is_openais():
    torch.manual_seed(0)
    model = CLIP(get_preset("ViT-B-32"))
    text, visual = model.text, model.visual
    block, width, layers = text.transformer.resblocks[3], 512, 12
    expected = {
        text.token_embedding.weight: 0.02,
        text.positional_embedding: 0.01,
        block.attn.in_proj.weight: width**-0.5,
        block.attn.out_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        block.mlp.c_fc.weight: (2 * width) ** -0.5,
        block.mlp.c_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        text.text_projection: width**-0.5,
        visual.class_embedding: 768**-0.5,
        visual.positional_embedding: 768**-0.5,
        visual.proj: 768**-0.5,
        visual.transformer.resblocks[0].attn.in_proj.weight: math.sqrt(2 / (768 + 3 * 768)),  # xavier
        visual.transformer.resblocks[0].attn.out_proj.weight: 768**-0.5 / math.sqrt(3),  # U(+-1 / sqrt(fan_in))
        visual.transformer.resblocks[0].mlp.c_fc.weight: 768**-0.5 / math.sqrt(3),
        visual.conv1.weight: (3 * 32 * 32) ** -0.5 / math.sqrt(3),
        text.transformer.resblocks[0].mlp.c_fc.bias: width**-0.5 / math.sqrt(3),
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.12)
        assert abs(parameter.mean().item()) < 0.1 * std
    for tower in (text, visual):
        assert not tower.transformer.resblocks[0].attn.in_proj.bias.any()
        assert not tower.transformer.resblocks[0].attn.out_proj.bias.any()
    assert model.logit_scale.item() == pytest.approx(2.6592600)


def test_initialisation_of_the_resnet_is_openais():
    torch.manual_seed(0)
    model = CLIP(get_preset("RN50"))
    pool, visual = model.visual.attnpool, model.visual
    for parameter in (pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight, pool.c_proj.weight):
        assert parameter.std().item() == pytest.approx(2048**-0.5, rel=0.05)
    assert pool.positional_embedding.std().item() == pytest.approx(2048**-0.5, rel=0.05)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        assert not any(block.bn3.weight.any() for block in stage)
    assert visual.bn3.weight.all()  # the stem's is not touched
