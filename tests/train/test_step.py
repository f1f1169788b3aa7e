"""Gradient caching equals one pass."""

import os
from dataclasses import replace

import pytest
import torch

from diptych.errors import UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.ranks import Ranks
from diptych.shards.loader import Batch, Position
from diptych.train.parallel.micro_batch import choose_micro_batch_size, free_memory, kept_bytes
from diptych.train.step import Step
from samples import TINY_RESNET, TINY_VIT


def make_step(config, *, patch_dropout=0.0, seed=0, dtype=torch.float32):
    torch.manual_seed(0)
    model = CLIP(config)
    return Step(
        model=model,
        plain=model,
        ranks=Ranks(),
        preprocess=Preprocess(image_size=config.vision.image_size),
        device=torch.device("cpu"),
        dtype=dtype,
        seed=seed,
        patch_dropout=patch_dropout,
    )


def make_batch(config, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    text = torch.randint(1, 500, (n, config.text.context_length), generator=generator)
    ends = torch.randint(2, config.text.context_length, (n,), generator=generator)
    text[torch.arange(n), ends] = config.text.vocab_size - 1
    return Batch(
        image=torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator),
        text=text,
        position=Position(seed=0, dataset_hash="", batch_size=n),
        keys=("",) * n,
        pictures=(0,) * n,
        skipped=(),
    )


def gradients(step, batch, micro_batch_size):
    step.plain.zero_grad()
    loss = step.gradients(batch, 1000, micro_batch_size)
    return loss, {name: p.grad.clone() for name, p in step.plain.named_parameters()}


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch_size", [1, 7, 16, 39])
@pytest.mark.parametrize("logit_bias", [False, True])
def test_micro_batches_give_the_gradients_of_one_pass(micro_batch_size, patch_dropout, logit_bias):
    config = replace(TINY_VIT, logit_bias=logit_bias)
    step, batch = make_step(config, patch_dropout=patch_dropout), make_batch(config)
    loss, whole = gradients(step, batch, 40)
    again, parts = gradients(step, batch, micro_batch_size)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 2e-5 * expected.norm() + 1e-8, name


def test_random_numbers_inside_the_model_are_the_same_in_both_passes():
    step, batch = make_step(TINY_VIT), make_batch(TINY_VIT)
    step.plain.visual.ln_pre.register_forward_hook(lambda _, __, x: torch.nn.functional.dropout(x, 0.3))
    seen = []
    step.plain.visual.register_forward_hook(lambda _, __, x: seen.append(x.detach().clone()))
    gradients(step, batch, 10)
    first, second = seen[:4], seen[4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_running_statistics_change_once():
    step, batch = make_step(TINY_RESNET), make_batch(TINY_RESNET)
    gradients(step, batch, 10)
    cached = {name: buffer.clone() for name, buffer in step.plain.named_buffers()}
    other = make_step(TINY_RESNET)
    with torch.no_grad():
        for start in range(0, 40, 10):
            other.forward(batch, slice(start, start + 10), 1000)
    assert all(torch.equal(cached[name], buffer) for name, buffer in other.plain.named_buffers())
    assert cached["visual.bn1.num_batches_tracked"] == 4


def test_patches_depend_on_the_place_in_the_run_alone():
    step = make_step(TINY_VIT, patch_dropout=0.5)
    whole = step.draw_patches(100, 20)
    assert whole.shape == (20, 8)
    assert torch.equal(torch.cat([step.draw_patches(100, 13), step.draw_patches(113, 7)]), whole)
    assert not torch.equal(step.draw_patches(120, 20), whole)
    assert not torch.equal(make_step(TINY_VIT, patch_dropout=0.5, seed=1).draw_patches(100, 20), whole)
    assert all(len(set(row.tolist())) == 8 for row in whole)


def test_a_loss_that_is_not_finite_leaves_no_gradient():
    step, batch = make_step(TINY_VIT), make_batch(TINY_VIT)
    with torch.no_grad():
        step.plain.logit_scale.fill_(torch.nan)
    for micro_batch_size in (40, 10):
        assert step.gradients(batch, 0, micro_batch_size).isnan()
        assert all(parameter.grad is None for parameter in step.plain.parameters())


def test_free_memory_is_told_or_half_of_the_machine(tmp_path):
    (told := tmp_path / "meminfo").write_text("MemTotal:       900 kB\nMemAvailable:   7 kB\n")
    assert free_memory(torch.device("cpu"), told) == 7 << 10
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_memory(torch.device("cpu"), tmp_path / "none") == machine // 2


def test_the_micro_batch_is_what_fits_into_memory():
    step, batch = make_step(TINY_VIT), make_batch(TINY_VIT, n=256)
    per_pair = (kept_bytes(step, batch, 16) - kept_bytes(step, batch, 8)) / 8
    weights = 3 * 4 * sum(p.numel() for p in step.plain.parameters())
    enough = int(2 * (weights + 300 * per_pair))
    assert choose_micro_batch_size(step, batch, Ranks(), enough) == 256
    assert choose_micro_batch_size(step, batch, Ranks(), int(2 * (weights + 100 * per_pair))) == 64
    with pytest.raises(UsageError, match="do not hold this model"):
        choose_micro_batch_size(step, batch, Ranks(), weights)
