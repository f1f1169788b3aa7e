import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diptych.model.config import CLIPConfig
from diptych.model.inference.precision import get_ready
from diptych.model.inference.text import build_tries, encode_texts, sort_rows
from diptych.model.text import TextTransformer
from diptych.tokenizer import Tokenizer
from reference import texts as slow
from samples import TINY_VIT

NAMES = ["cat", "dog", "great white shark", "great grey owl", "electric ray", "cat tree", "xylophone & bow"]
TEMPLATES = ["a photo of a {}.", "a photo of the {}.", "itap of a {}.", "{}", "a photo of many {}."]


def build_tower(config: CLIPConfig = TINY_VIT) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(config.text, config.embed_dim, config.activation).eval()
    with torch.no_grad():
        for weight in tower.parameters():  # as initialised, neighbours hardly matter
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return tower


@pytest.fixture(scope="module")
def tower() -> TextTransformer:
    return build_tower()


def prompts(length: int = 16) -> torch.Tensor:
    return Tokenizer.clip(length)([template.replace("{}", name) for name in NAMES for template in TEMPLATES])


@torch.no_grad()
def distance(tower: TextTransformer, text: torch.Tensor, max_tokens: int) -> float:
    fast = F.normalize(encode_texts(tower, get_ready(tower.transformer, "exact"), text, max_tokens), dim=-1)
    return (fast - F.normalize(slow.encode(tower, text), dim=-1)).abs().max().item()


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 4096])
def test_prompts_have_the_features_of_the_slow_twin_whatever_the_size_of_a_trie(tower, max_tokens):
    assert distance(tower, prompts(), max_tokens) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_tower_itself_gives_the_same(activation):
    tower, text = build_tower(dataclasses.replace(TINY_VIT, activation=activation)), prompts()
    with torch.no_grad():
        fast = encode_texts(tower, get_ready(tower.transformer, "exact"), text)
        torch.testing.assert_close(fast, tower(text), rtol=1e-5, atol=1e-5)


rows = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 60))
def test_any_rows_have_the_features_of_the_slow_twin(texts, max_tokens):
    # Three words only: rows share much, repeat and begin one another; what follows an end token is arbitrary.
    end, length = 9, 11
    text = torch.tensor([[*row, end, *range(length - 1 - len(row))] for row in texts], dtype=torch.long)
    tower = TOWER
    assert not texts or distance(tower, text.view(-1, length), max_tokens) < 1e-5


TOWER = build_tower()


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 60))
def test_every_beginning_is_in_one_trie_once(texts, max_tokens):
    text = torch.tensor([[*row, 9, *[0] * (10 - len(row))] for row in texts], dtype=torch.long).view(-1, 11)
    sorted_rows, inverse = sort_rows(text.numpy())
    assert len(sorted_rows) == len({tuple(row) for row in texts})
    for row, at in zip(texts, inverse, strict=True):
        assert sorted_rows[at][: len(row) + 1].tolist() == [*row, 9]
    (whole, *none) = [*build_tries(sorted_rows, 10_000), None]
    assert len(none) == (1 if texts else 0)
    if whole is not None:
        assert len(whole.tokens) == len(slow.prefixes(text))
    tries = list(build_tries(sorted_rows, max_tokens))
    assert sum(len(trie.ends) for trie in tries) == len(sorted_rows)
    assert all(len(trie.tokens) <= max_tokens or len(trie.ends) == 1 for trie in tries)


def test_a_thousand_names_in_eighty_templates_cost_four_tokens_a_text():
    text = Tokenizer.clip()([f"a photo of the very same {a} {b}." for a in ("red", "blue") for b in range(10, 99)])
    sorted_rows, _ = sort_rows(text.numpy())
    (trie,) = build_tries(sorted_rows, 4096)
    assert len(trie.tokens) / len(text) < 4 < len(text[0].nonzero())


def test_no_texts_have_no_features(tower):
    ready = get_ready(tower.transformer, "exact")
    assert encode_texts(tower, ready, torch.zeros(0, 16, dtype=torch.long)).shape == (0, 24)


def test_tokens_behind_the_end_token_do_not_matter(tower):
    text = prompts()
    noisy = text.clone()
    noisy[text == 0] = 5
    ready = get_ready(tower.transformer, "exact")
    with torch.no_grad():
        assert torch.equal(encode_texts(tower, ready, text), encode_texts(tower, ready, noisy))


def test_attention_is_padded_by_a_fifth_at_most():
    text = np.array([[*range(1, n + 1), 99, *[0] * (60 - n)] for n in range(1, 60)] + [[2, 99] + [0] * 59])
    (trie,) = build_tries(sort_rows(text)[0], 4096)
    for group in trie.groups:
        own = torch.tensor([len(set(row)) for row in group.own.tolist()])
        assert group.own.shape[1] <= 1.2 * own.min()
