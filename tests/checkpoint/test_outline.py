import torch
from safetensors.torch import save_file

from diptych.checkpoint.weights.outline import write_outline
from diptych.checkpoint.weights.tensors import read_safetensors


def test_an_outline_that_is_filled_is_the_file_that_safetensors_writes(tmp_path):
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
    save_file(tensors, tmp_path / "theirs")
    write_outline(tmp_path / "ours", tensors)
    entries = read_safetensors(tmp_path / "ours").entries
    assert entries.keys() == tensors.keys()
    with open(tmp_path / "ours", "r+b") as file:
        for name, tensor in tensors.items():
            file.seek(entries[name].start)
            file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


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
