import pytest
import torch

from diptych.model.clip import CLIP
from diptych.model.config import CLIPConfig, ViTConfig
from diptych.train.config import OptimConfig
from diptych.train.optim import build_optimizer, learning_rate, split_parameters
from samples import TINY_RESNET, TINY_VIT


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero():
    config = OptimConfig(lr=1.0, warmup=10)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET])
def test_only_gains_and_biases_and_the_temperature_are_not_decayed(config: CLIPConfig):
    model = CLIP(config)
    decayed, kept = split_parameters(model)
    assert decayed.keys() | kept.keys() == dict(model.named_parameters()).keys()
    assert not decayed.keys() & kept.keys()
    assert all(name.endswith(("bias", "logit_scale")) or p.ndim == 1 for name, p in kept.items())
    assert "text.token_embedding.weight" in decayed
    assert "text.positional_embedding" in decayed
    assert "logit_scale" in kept
    assert "text.ln_final.weight" in kept
    if isinstance(config.vision, ViTConfig):
        assert "visual.class_embedding" in decayed


@pytest.mark.parametrize(("config", "betas", "eps"), [(TINY_VIT, (0.9, 0.98), 1e-6), (TINY_RESNET, (0.9, 0.999), 1e-8)])
def test_betas_and_eps_follow_the_image_towers_family(config, betas, eps):
    group = build_optimizer(CLIP(config), OptimConfig()).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == (betas, eps, 0.2)


def test_given_beta2_and_eps_win():
    group = build_optimizer(CLIP(TINY_VIT), OptimConfig(beta2=0.95, eps=1e-7)).param_groups[0]
    assert (group["betas"][1], group["eps"]) == (0.95, 1e-7)


def test_weight_decay_is_decoupled():
    model = CLIP(TINY_VIT)
    before = model.visual.proj.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.visual.proj.detach(), before * (1 - 0.1 * 0.5))
