"""What PyTorch does not promise to keep. Tried with 2.11.0 (`make test-oldest`), 2.13.0 and 2.14.1."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import diptych
from diptych.model import operators

with_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
OWN = ("_SILU_BACKWARD", "_SOFTMAX_BACKWARD", "_PACK", "HAS_INT8")


def test_nothing_else_reaches_into_pytorch():
    private = re.compile(r"""(?<!["'])torch\.(ops\.|_(?!_))|from torch[.\w]* import _|from torch\._""")
    source = Path(diptych.__file__).parent
    found = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if private.search(path.read_text("utf-8"))
    }
    assert found == {"model/operators.py"}


@with_onednn
def test_this_pytorch_has_all_of_them():
    assert {name: getattr(operators, name) for name in OWN} == dict.fromkeys(OWN, True)


def test_an_operator_with_another_schema_is_not_called():
    assert operators._is_known("aten::silu_backward(Tensor grad_output, Tensor self) -> Tensor")
    assert not operators._is_known("aten::silu_backward(Tensor grad_output, Tensor self, int dim) -> Tensor")
    assert not operators._is_known("aten::_no_such_operator(Tensor self) -> Tensor")
    assert not operators._is_known("no_such_space::silu(Tensor self) -> Tensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_forms_are_the_same_derivatives(monkeypatch, dtype):
    torch.manual_seed(0)
    derivative, x = torch.randn(2, 3, 7, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    p = x.softmax(dim=-1)
    private = operators.silu_backward(derivative, x), operators.softmax_backward(derivative, p)
    for name in OWN:
        monkeypatch.setattr(operators, name, False)
    plain = operators.silu_backward(derivative, x), operators.softmax_backward(derivative, p)
    for one, other in zip(private, plain, strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=1e-5)


def test_plain_forms_of_many_tensors_are_the_same(monkeypatch):
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(5, 3), torch.randn(4)]
        lengths = operators.norms(tensors)
        operators.scale_all(tensors, torch.tensor(0.5))
        return [*lengths, *tensors]

    private = run()
    monkeypatch.delattr(torch, "_foreach_norm")
    monkeypatch.delattr(torch, "_foreach_mul_")
    for one, other in zip(private, run(), strict=True):
        torch.testing.assert_close(one, other)


@with_onednn
@pytest.mark.parametrize("activation", ["none", "swish", "gelu"])
def test_a_packed_product_is_the_product(activation):
    x, weight, bias = torch.randn(5, 24), torch.randn(16, 24), torch.randn(16)
    expected = {"none": lambda y: y, "swish": F.silu, "gelu": F.gelu}[activation](F.linear(x, weight, bias))
    torch.testing.assert_close(
        operators.multiply_packed(x, operators.pack(weight), bias, activation), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("breaks", ["raise", "other values"])
def test_nothing_is_packed_where_the_product_fails(monkeypatch, breaks):
    def multiply(x: torch.Tensor, *_: object) -> torch.Tensor:
        if breaks == "raise":
            raise RuntimeError("could not create a primitive")
        return x.new_zeros(2, 2)

    operators.can_pack.cache_clear()
    monkeypatch.setattr(operators, "multiply_packed", multiply)
    assert not operators.can_pack(torch.float32)
    operators.can_pack.cache_clear()
