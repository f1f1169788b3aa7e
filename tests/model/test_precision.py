import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diptych.model.clip import CLIP
from diptych.model.config import TextConfig
from diptych.model.inference import precision
from diptych.model.inference.precision import choose_precision, get_ready
from diptych.model.inference.text import encode_texts
from diptych.model.text import TextTransformer
from diptych.tokenizer import Tokenizer
from samples import TINY_VIT


@pytest.fixture
def tower() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(TINY_VIT.text, 24, "quick_gelu").eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_bfloat16_is_within_a_ten_thousandth_of_exact(activation):
    torch.manual_seed(0)
    tower = TextTransformer(TextConfig(width=256, heads=4, layers=12), 256, activation).eval()
    text = Tokenizer.clip()([f"{a} photo of {b} {c}" for a in ("a", "this bad") for b in "xyz" for c in ("cat", "owl")])
    with torch.no_grad():
        exact, rounded = (encode_texts(tower, get_ready(tower.transformer, p), text) for p in ("exact", "bfloat16"))
    cosine = F.cosine_similarity(exact, rounded)
    assert 0.9999 < cosine.min() < 1 - 1e-7  # it is another computation


def test_linear_layers_are_rounded_and_nothing_else(tower):
    ready = get_ready(tower.transformer, "bfloat16")
    kinds = {type(layer) for block in ready.blocks for layer in block.modules()} - {type(ready.blocks[0])}
    assert nn.Linear not in kinds
    assert {precision.PackedLinear, nn.LayerNorm} <= kinds
    assert ready.blocks[0].ln_1.weight.dtype == torch.float32
    assert not any(p.requires_grad for block in ready.blocks for p in block.parameters())
    assert all(p.dtype == torch.float32 for p in tower.parameters())


def test_exact_is_the_tower_itself(tower):
    assert get_ready(tower.transformer, "exact").blocks == tower.transformer.blocks()
    half = tower.to(torch.bfloat16)  # it was loaded so: there is nothing to round
    assert get_ready(half.transformer, "bfloat16").blocks == half.transformer.blocks()


def test_weights_are_made_ready_once_and_again_when_they_change(tower):
    first = get_ready(tower.transformer, "bfloat16")
    assert get_ready(tower.transformer, "bfloat16") is first
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.1)
    tower(torch.tensor([[1, 2, 9]])).sum().backward()
    optimizer.step()
    second = get_ready(tower.transformer, "bfloat16")
    assert second is not first
    rows = torch.randn(2, TINY_VIT.text.width).bfloat16()
    with torch.no_grad():
        assert not torch.equal(second.blocks[0].mlp.c_fc(rows), first.blocks[0].mlp.c_fc(rows))
    tower.load_state_dict({name: value + 1 for name, value in tower.state_dict().items()})
    third = get_ready(tower.transformer, "bfloat16")
    assert third is not second
    tower.load_state_dict({name: value + 1 for name, value in tower.state_dict().items()}, assign=True)
    assert get_ready(tower.transformer, "bfloat16") is not third


def test_what_was_made_ready_goes_with_its_model():
    model = CLIP(TINY_VIT)
    get_ready(model.text.transformer, "bfloat16")
    gc.collect()  # of earlier tests
    kept = len(precision._MADE)
    del model
    gc.collect()
    assert len(precision._MADE) == kept - 1


@pytest.mark.parametrize(
    ("device", "capabilities", "expected"),
    [
        ("cpu", {"amx_bf16": True}, "bfloat16"),
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ("cpu", {"avx512_bf16": False}, "float32"),
        ("cpu", {}, "float32"),
        ("cuda", {"bfloat16": True}, "bfloat16"),
        ("cuda", {}, "float32"),  # before Ampere it is emulated
        ("mps", {}, "float32"),
    ],
)
def test_auto_asks_the_processor(monkeypatch, device, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: "bfloat16" in capabilities)
    assert choose_precision("auto", torch.device(device)) == expected
    assert choose_precision("exact", torch.device(device)) == "exact"


def test_a_precision_that_does_not_exist_is_refused():
    # In a process of its own: here the type hook would speak first.
    code = (
        "import torch\n"
        "from diptych.model.inference.precision import choose_precision\n"
        "try: choose_precision('bf16', torch.device('cpu'))\n"
        "except ValueError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    known = "Known: auto, bfloat16, exact, float32, int8"
    assert done.stdout == f"unknown precision 'bf16'; did you mean bfloat16? {known}\n", done.stderr
