import numpy as np
import pytest
import torch

from diptych.train.loss import clip_loss
from reference import clip_loss as slow


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_loss_and_every_gradient_equal_the_papers_pseudo_code(n):
    rng = np.random.default_rng(n)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, n, 12)))
    t = np.log(1 / 0.07)
    expected = slow.clip_loss(image, text, t)

    image, text, t = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (image, text, t))
    loss = clip_loss(image, text, t.exp())
    loss.backward()

    for ours, theirs in zip((loss, image.grad, text.grad, t.grad), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-6)


def test_loss_of_bfloat16_features_is_computed_in_float32():
    features = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1).bfloat16()
    assert clip_loss(features, features, torch.tensor(14.3)).dtype == torch.float32


def test_loss_of_random_features_is_near_log_n():
    torch.manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 512, 256), dim=-1)
    assert clip_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(np.log(512), rel=1e-2)
