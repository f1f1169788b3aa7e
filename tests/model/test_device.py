import pytest
import torch

from diptych.errors import UsageError
from diptych.model import device
from diptych.model.device import choose_device
from diptych.ranks import Ranks


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cuda:x", "CPU", "meta", ""])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(name):
    with pytest.raises(UsageError, match=rf"no device '{name}' here; PyTorch finds cpu.* or auto"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_there_where_pytorch_finds_none():
    with pytest.raises(UsageError, match="no device 'cuda' here; PyTorch finds cpu on this machine"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_every_rank_takes_its_own_gpu_of_those_that_are_there(monkeypatch):
    monkeypatch.setattr(device, "_count_devices", lambda: {"cpu": 1, "cuda": 2})
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("auto", Ranks(1, 2, 1)) == choose_device("cuda", Ranks(1, 2, 1)) == torch.device("cuda:1")
    assert choose_device("cpu", Ranks(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"no device 'cuda:2' here; PyTorch finds cpu, cuda:0, cuda:1"):
        choose_device("auto", Ranks(2, 4, 2))
