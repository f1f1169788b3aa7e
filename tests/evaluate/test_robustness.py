"""Robustness: the fit against numpy and scipy, class maps by hand, the user's table."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.metrics.robustness import (
    effective_robustness,
    fit_line,
    fit_shift,
    logit,
    map_classes,
    read_table,
    relative_robustness,
    select_classes,
    sigmoid,
)


def made_up_models(count=40, slope=1.1, intercept=-0.6, noise=0.05):
    generator = np.random.default_rng(3)
    x = special.logit(generator.uniform(0.4, 0.9, count))
    y = slope * x + intercept + generator.normal(0, noise, count)
    return list(zip(special.expit(x).tolist(), special.expit(y).tolist(), strict=True))


def test_the_line_is_numpy_s_least_squares_in_logit_space():
    models = made_up_models()
    x, y = special.logit(np.array(models)).T
    slope, intercept = np.polyfit(x, y, 1)
    line = fit_line(models)
    assert (line.slope, line.intercept) == (pytest.approx(slope, rel=1e-9), pytest.approx(intercept, rel=1e-9))
    assert line.correlation == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-9)
    assert line.models == 40


def test_a_line_without_noise_is_found_and_its_models_have_no_effective_robustness():
    models = made_up_models(noise=0)
    line = fit_line(models)
    assert (line.slope, line.intercept) == (pytest.approx(1.1), pytest.approx(-0.6))
    for on_imagenet, under_shift in models:
        assert effective_robustness(line, on_imagenet, under_shift) == pytest.approx(0, abs=1e-12)


def test_effective_robustness_is_what_lies_above_the_line():
    line = fit_line([(0.5, 0.3), (0.8, 0.6)])
    assert effective_robustness(line, 0.8, 0.75) == pytest.approx(0.15)
    assert line.expected(1.0) == 1.0
    assert line.expected(0.0) == 0.0
    assert relative_robustness(0.70, 0.64) == pytest.approx(-0.06)


@pytest.mark.parametrize("share", [0.0, 1e-12, 0.2, 0.5, 0.999, 1.0])
def test_logit_and_sigmoid_are_scipy_s(share):
    assert logit(share) == pytest.approx(special.logit(share), rel=1e-12)
    assert sigmoid(logit(share)) == pytest.approx(share)


@pytest.mark.parametrize(
    "models", [[], [(0.5, 0.4)], [(0.5, 0.4), (0.5, 0.3)], [(0.5, 0.0), (0.6, 0.2)], [(50.0, 40.0), (60.0, 50.0)]]
)
def test_what_gives_no_line_is_refused(models):
    with pytest.raises(UsageError, match=r"line|logit"):
        fit_line(models)


def test_groups_take_the_highest_of_their_classes():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.5], [0.7, 0.2, 0.6, 0.4]])
    assert torch.equal(map_classes(scores, [[0, 2], [3]]), torch.tensor([[0.3, 0.5], [0.7, 0.4]]))


def test_a_group_without_classes_is_never_the_best_and_groups_may_share_classes():
    scores = torch.tensor([[-5.0, -7.0], [3.0, 2.0]])
    mapped = map_classes(scores, [[], [1], [0, 1]])
    assert mapped.argmax(dim=1).tolist() == [2, 2]
    assert mapped.argmin(dim=1).tolist() == [0, 0]


@pytest.mark.parametrize("classes", [[], [4], [-1], [1, 1]])
def test_subsets_that_cannot_be_are_refused(classes):
    with pytest.raises(UsageError, match=r"class"):
        select_classes(torch.zeros(2, 4), torch.tensor([0, 1]), classes)


@pytest.mark.parametrize("groups", [[], [[]], [[0], [4]], [[-1]]])
def test_groups_that_cannot_be_are_refused(groups):
    with pytest.raises(UsageError, match=r"class|group"):
        map_classes(torch.zeros(2, 4), groups)


def test_a_subset_is_scored_among_its_own_classes():
    """The full ranking is wrong on each of these pictures, that of the subset right."""
    scores = torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.9, 0.1, 0.3, 0.0], [0.9, 0.0, 0.0, 0.0], [0.9, 0.1, 0.2, 0.5]])
    labels = torch.tensor([1, 2, 0, 3])
    chosen, numbers = select_classes(scores, labels, [2, 1])
    assert torch.equal(numbers, torch.tensor([1, 0]))
    assert torch.equal(chosen, torch.tensor([[0.1, 0.2], [0.3, 0.1]]))
    assert accuracy(scores, labels) == 0.25
    assert accuracy(chosen, numbers) == 1.0


def test_the_table_may_be_in_percent_and_have_holes(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model, imagenet,imagenet_a,imagenet@imagenet_a,imagenet_v2\nr50,76,0,92,63\nr101,77,3,,66\n")
    r50, r101 = read_table(path)
    assert r50.pair("imagenet_a") == (0.92, 0.0)
    assert r101.pair("imagenet_a") == (0.77, 0.03)
    assert r101.pair("objectnet") is None
    line = fit_shift([r50, r101], "imagenet_v2")
    assert line
    assert line.expected(0.77) == pytest.approx(0.66)
    assert fit_shift([r50, r101], "imagenet_a") is None, "one of two is at 0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,imagenet\na,1\n", "needs model, imagenet"),
        ("model,imagenet\na,good\n", "'good'"),
        ("model,imagenet\na,101\n", "percent"),
        ("model,imagenet\na,nan\n", "percent"),
        ("model,imagenet\na,1,2\n", "more cells"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, text, said):
    path = tmp_path / "models.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_table(path)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv")


def test_a_flat_line_has_no_correlation():
    assert math.isnan(fit_line([(0.5, 0.3), (0.6, 0.3)]).correlation)
