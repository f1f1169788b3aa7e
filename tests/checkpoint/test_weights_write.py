import pytest
import torch
from safetensors.torch import save_file

from diptych.checkpoint.weights.tensors import read_safetensors
from diptych.checkpoint.weights.write import on_first, save_tensors
from diptych.ranks import Ranks


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_the_one_that_safetensors_writes(tmp_path, metadata):
    tensors = {
        "steps": torch.tensor(7),
        "rng": torch.arange(5, dtype=torch.uint8),
        "b": torch.randn(3, 2),
        "a.ä": torch.randn(4, 3),
        "half": torch.randn(3).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "mask": torch.tensor([True, False, True]),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "tiny": torch.arange(3, dtype=torch.int8),
        "nothing": torch.zeros(0, 4),
        'quoted "\n"': torch.ones(()),
    }
    save_file(tensors, tmp_path / "theirs", metadata)
    save_tensors(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_is_not_contiguous_is_written_in_order(tmp_path):
    tensor = torch.randn(3, 5).T
    save_tensors({"x": tensor}, tmp_path / "file")
    assert torch.equal(read_safetensors(tmp_path / "file").read()["x"], tensor)


def test_a_failure_of_one_process_is_told_as_it_is():
    def fail() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match=r"^no space left"):
        on_first(Ranks(), fail)


def test_a_file_that_is_mapped_has_the_tensors_that_were_saved(tmp_path):
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.ones(()),
        "d": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "file")
    mapped = read_safetensors(tmp_path / "file").map()
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(mapped[name], tensor)
        mapped[name].add_(1)
    assert torch.equal(read_safetensors(tmp_path / "file").map()["a"], tensors["a"])
