"""Attention: the short way through it equals the textbook."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.model.transformer import attend


def attention_in_float64(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    scores = q.double() @ k.double().transpose(2, 3) / q.shape[3] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return scores.softmax(dim=-1) @ v.double()


def errors(attention, inputs: list[Tensor], weight: Tensor, is_causal: bool) -> list[float]:
    """Relative error of the output and of the three derivatives, against float64."""

    def differentiate(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves, is_causal)
        return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]

    pairs = zip(differentiate(attention), differentiate(attention_in_float64), strict=True)
    return [((mine - exact).norm() / exact.norm()).item() for mine, exact in pairs]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [2, 18, 50, 257])
def test_bfloat16_attention_is_no_less_exact_than_the_flash_kernel(length: int, is_causal: bool) -> None:
    torch.manual_seed(0)
    *inputs, weight = [torch.randn(2, 4, length, 64).mul(2).bfloat16() for _ in range(4)]

    def flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    mine, theirs = (errors(function, inputs, weight, is_causal) for function in (attend, flash))
    assert all(a <= 1.5 * b + 1e-3 and a < 0.01 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def test_probabilities_are_kept_in_16_bits_only() -> None:
    def maker(dtype: torch.dtype) -> str:
        q = torch.randn(1, 1, 50, 8, dtype=dtype).requires_grad_()
        return type(attend(q, q, q, False).grad_fn).__name__

    assert maker(torch.bfloat16) == "_KeptAttentionBackward"
    assert maker(torch.float32) != "_KeptAttentionBackward"
    assert maker(torch.float64) != "_KeptAttentionBackward"


COMPILED = """
import torch
from diptych.model.transformer import attend
torch.manual_seed(0)
q, k, v = (torch.randn(2, 2, 9, 16).bfloat16().requires_grad_() for _ in range(3))
for is_causal in (False, True):
    def derive(function):
        return torch.autograd.grad(function(q, k, v, is_causal).float().square().sum(), (q, k, v))
    for a, b in zip(derive(attend), derive(torch.compile(attend, fullgraph=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_attention_compiles_in_one_graph_and_equals_itself() -> None:
    subprocess.run([sys.executable, "-c", COMPILED], check=True)  # here types are checked, which does not compile
