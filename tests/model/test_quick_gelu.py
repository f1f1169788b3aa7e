import pytest
import torch

from diptych.model.transformer import QuickGELU


def plain(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_value_and_derivative_are_those_of_the_formula(scale):
    x = (scale * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    gradient = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    values = [f(x) for f in (QuickGELU(), plain)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient)[0] for y in values), rtol=1e-12, atol=1e-12)


def test_its_input_is_left_as_it_was():
    x = torch.randn(4, 4)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(QuickGELU()(x), plain(x))
    assert torch.equal(x, before)
