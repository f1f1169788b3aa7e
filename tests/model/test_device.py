import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.checkpoint.layouts import load
from diptych.errors import UsageError
from diptych.model import device
from diptych.model.clip import CLIP
from diptych.model.device import choose_device, widest_dtype
from diptych.model.inference.precision import get_ready
from diptych.model.inference.text import build_tries, encode_trie, move_trie, sort_rows
from diptych.model.inference.vision import get_encoder
from diptych.ranks import Ranks
from diptych.train import loss
from diptych.train.loss import clip_loss, siglip_loss
from samples import TINY_RESNET, TINY_VIT


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cuda:x", "CPU", "meta", ""])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(name):
    with pytest.raises(UsageError, match=rf"no device '{name}' here; PyTorch finds cpu.* or auto"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_there_where_pytorch_finds_none():
    with pytest.raises(UsageError, match="no device 'cuda' here; PyTorch finds cpu on this machine"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", torch.device("cuda:99")])
def test_loading_onto_a_device_that_is_not_there_is_the_same_line(name):
    with pytest.raises(UsageError, match="no device 'cuda:99' here; PyTorch finds cpu"):
        load("no such model: the device is looked at first", device=name)


def test_every_rank_takes_its_own_gpu_of_those_that_are_there(monkeypatch):
    monkeypatch.setattr(device, "_count_devices", lambda: {"cpu": 1, "cuda": 2})
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("auto", Ranks(1, 2, 1)) == choose_device("cuda", Ranks(1, 2, 1)) == torch.device("cuda:1")
    assert choose_device("cpu", Ranks(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"no device 'cuda:2' here; PyTorch finds cpu, cuda:0, cuda:1"):
        choose_device("auto", Ranks(2, 4, 2))


class NoFloat64(TorchDispatchMode):
    """Apple's GPU, of which none is at hand, refuses every tensor of this type."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            assert not isinstance(one, torch.Tensor) or one.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_needs_no_float64_where_there_is_none(kind, monkeypatch):
    torch.manual_seed(0)

    def run() -> list[float]:
        image, text = (normalize(torch.randn(9, 8), dim=-1).requires_grad_() for _ in range(2))
        scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        more = (bias,) if kind == "siglip" else ()
        value = (siglip_loss if more else clip_loss)(image, text, scale, *more)
        value.backward()
        return [value.item(), scale.grad.item(), image.grad.sum().item()]

    state = torch.get_rng_state()
    there = run()
    torch.set_rng_state(state)
    monkeypatch.setattr(loss, "widest_dtype", lambda _: widest_dtype(torch.device("mps")))
    with NoFloat64():
        here = run()
    assert here == pytest.approx(there, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("precision", ["exact", "float32", "bfloat16"])
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["ViT", "ResNet"])
def test_no_operator_of_a_processor_is_called_elsewhere(config, precision):
    """The device `meta` computes shapes alone and, like a GPU, has none of oneDNN's operators."""
    meta = torch.device("meta")
    model = CLIP(config).eval().to(meta)
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    with torch.inference_mode():
        features = get_encoder(model.visual, precision, (0.5,) * 3, (0.3,) * 3)(pixels)
        ready = get_ready(model.text.transformer, precision)
        rows, _ = sort_rows(np.array([[1, 2, 9], [1, 3, 9]]))
        texts = [encode_trie(model.text, ready, move_trie(trie, meta)) for trie in build_tries(rows, 4096)]
    assert (features.device, texts[0].device) == (meta, meta)
    assert (len(features), len(texts[0])) == (3, 2)
