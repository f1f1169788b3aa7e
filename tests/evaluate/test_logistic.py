"""Logistic regression against scikit-learn, run until it can do no better."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.evaluate.probe import logistic
from diptych.evaluate.probe.logistic import Point, Problem
from reference import probe as plain

PATH = [10.0**decade for decade in range(6, -7, -1)]
TIGHT = {"tol": 1e-12, "max_iter": 20_000}


def draw(pictures, columns, classes, seed=0, apart=1.0):
    """Features with a spectrum and a mean, as a network's are, and classes that overlap."""
    random = torch.Generator().manual_seed(seed)
    spectrum = (1 + torch.arange(columns)) ** -0.5
    centres = torch.randn(classes, columns, generator=random) * spectrum * apart
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (pictures - classes,), generator=random)])
    features = centres[labels] + torch.randn(pictures, columns, generator=random) * spectrum + 0.5
    return features, labels


def best_of_scikit_learn(features, labels, l2):
    """The lowest objective that one of its solvers reaches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some runs end before they should; the other solver is then lower
        models = [plain.fit(features, labels, l2, solver=solver, **TIGHT) for solver in ("newton-cholesky", "lbfgs")]
    return min((plain.objective(model, features, labels, l2), i, model) for i, model in enumerate(models))[::2]


@pytest.mark.parametrize(("pictures", "columns", "classes"), [(400, 30, 7), (60, 90, 5), (300, 20, 2)])
def test_the_objective_is_scikit_learns_at_every_strength(pictures, columns, classes):
    features, labels = draw(pictures, columns, classes)
    problem, path = Problem(features[None], labels[None], classes), []
    for l2 in PATH:
        fit = problem.fit(l2, path)
        path.append(fit)
        least, model = best_of_scikit_learn(features.double().numpy(), labels.numpy(), l2)
        assert fit.converged
        assert fit.objective.item() == pytest.approx(least, rel=1e-6)
        scores = fit.scores(features[None])[0]
        assert (scores.argmax(dim=1).numpy() == model.predict(features.double().numpy())).mean() > 0.99


def test_probabilities_are_scikit_learns():
    for classes in (2, 4):
        features, labels = draw(300, 10, classes)
        fit = Problem(features[None], labels[None], classes).fit(0.5)
        _, model = best_of_scikit_learn(features.double().numpy(), labels.numpy(), 0.5)
        ours = fit.scores(features[None])[0].softmax(dim=1).numpy()
        np.testing.assert_allclose(ours, model.predict_proba(features.double().numpy()), atol=2e-3)


def test_separate_columns_are_one_regression_each():
    features, _ = draw(200, 15, 5)
    random = torch.Generator().manual_seed(1)
    labels = (features @ torch.randn(15, 4, generator=random) + torch.randn(200, 4, generator=random) > 1).float()
    fit = Problem(features[None], labels[None], 4).fit(0.1)
    for column in range(4):
        least, model = best_of_scikit_learn(features.double().numpy(), labels[:, column].long().numpy(), 0.1)
        assert fit.objective[0, column].item() == pytest.approx(least, rel=1e-6)
        np.testing.assert_allclose(fit.weight[0, :, column], model.coef_[0], atol=2e-3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_rough_products_lead_to_the_same_optimum(precision):
    features, labels = draw(1500, 64, 20, apart=0.7)
    exact, rough = (Problem(features[None], labels[None], 20) for _ in range(2))
    exact.precisions, rough.precisions = (torch.float64,), (precision,)
    paths = [], []
    for l2 in PATH[::3]:
        for problem, path in zip((exact, rough), paths, strict=True):
            path.append(problem.fit(l2, path))
        assert paths[1][-1].converged
        assert paths[1][-1].objective.item() == pytest.approx(paths[0][-1].objective.item(), rel=1e-6)


def test_large_problems_take_rough_products_and_small_ones_do_not():
    small, large = (Problem(torch.randn(1, n, d), (torch.arange(n) % 9)[None], 9) for n, d in ((90, 8), (4000, 512)))
    assert small.precisions == (torch.float64,)
    assert large.precisions[-2:] == (torch.float32, torch.float64)


@st.composite
def small_problems(draw):
    classes = draw(st.integers(2, 5))
    pictures = draw(st.integers(classes, 40))
    columns = draw(st.integers(1, 50))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randn(pictures, columns, generator=random, dtype=torch.float64)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (pictures - classes,), generator=random)])
    match draw(st.sampled_from(["plain", "separable", "scaled", "constant", "repeated", "unbalanced", "far"])):
        case "separable":
            features += 5 * torch.randn(classes, columns, generator=random, dtype=torch.float64)[labels]
        case "scaled":
            features *= 10 ** (4 * torch.rand(columns, generator=random, dtype=torch.float64) - 2)
        case "constant":
            features[:, 0] = 3.0
        case "repeated":  # the same row under different labels
            features = features[torch.randint(pictures, (pictures,), generator=random)]
        case "unbalanced":
            labels[classes:] = 0
        case "far":
            features += 10
    return features, labels, classes, draw(st.sampled_from([1e6, 1e3, 1.0, 1e-3, 1e-6]))


@given(small_problems())
@settings(max_examples=120, deadline=None)
def test_small_problems_of_every_kind_reach_their_optimum(problem):
    features, labels, classes, l2 = problem
    fit = Problem(features[None], labels[None], classes).fit(l2)
    assert fit.converged
    least, _ = best_of_scikit_learn(features.numpy(), labels.numpy(), l2)
    assert fit.objective.item() <= least * (1 + 1e-6)  # scikit-learn stops early on some of them
    rounding = 1e-13 * len(labels)  # of the bound below, which is written plainly
    assert lower_bound(features, labels, fit) >= fit.objective.item() * (1 - 1e-6) - rounding


def lower_bound(features, labels, fit):
    """Of every objective: the dual of the problem at the fit's probabilities, after the bias has its best value."""
    weight, bias = fit.weight[0], fit.bias[0].clone()
    two = weight.shape[1] == 2
    for _ in range(50):  # the bias alone, by Newton's method
        p = (features @ weight + bias).softmax(dim=1)
        slope = p.sum(dim=0) - torch.bincount(labels, minlength=len(bias))
        bend = p.sum(dim=0).diag() - p.T @ p
        bias -= torch.linalg.pinv(bend, hermitian=True, rtol=1e-13) @ slope
    logits = features @ weight + bias
    p = logits.softmax(dim=1)
    losses = logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]
    residual = p - torch.nn.functional.one_hot(labels, len(bias))
    pull = features.T @ residual
    strength = 2 * fit.l2 if two else fit.l2  # one column of two classes, halved
    slope = pull + strength * weight
    return float(losses.sum() + strength / 2 * (weight**2).sum() - (slope**2).sum() / (2 * strength))


def test_the_gap_bounds_the_distance_from_the_optimum():
    features, labels = draw(300, 20, 6)
    problem = Problem(features[None], labels[None], 6)
    for l2 in (1e4, 1.0, 1e-4):
        least = problem.fit(l2, tolerance=1e-12).objective.item()
        for tolerance in (1e-1, 1e-2, 1e-4):
            fit = problem.fit(l2, tolerance=tolerance)
            assert fit.gap.item() <= tolerance
            assert fit.objective.item() - least <= fit.gap.item() * fit.objective.item() * (1 + 1e-9)


def test_a_batch_is_its_problems():
    drawn = [draw(80, 12, 4, seed) for seed in range(3)]
    features, labels = (torch.stack(part) for part in zip(*drawn, strict=True))
    together = Problem(features, labels, 4).fit(0.3)
    for i, (one, its) in enumerate(drawn):
        alone = Problem(one[None], its[None], 4).fit(0.3)
        assert together.objective[i].item() == pytest.approx(alone.objective.item(), rel=1e-6)
        torch.testing.assert_close(together.scores(features)[i], alone.scores(one[None])[0], atol=5e-3, rtol=0)


def test_a_fit_of_other_pictures_is_a_start():
    features, labels = draw(2000, 20, 6)
    first = Problem(features[None, :1800], labels[None, :1800], 6).fit(1.0)
    problem = Problem(features[None], labels[None], 6)
    warm, cold = problem.fit(1.0, [first]), problem.fit(1.0)
    assert warm.objective.item() == pytest.approx(cold.objective.item(), rel=1e-6)
    assert warm.products < cold.products


def test_a_fit_that_is_cut_short_says_so(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_STEPS", 1)
    features, labels = draw(300, 20, 6)
    fit = Problem(features[None], labels[None], 6).fit(1e-4)
    assert not fit.converged
    assert fit.gap.item() > logistic.TOLERANCE


def test_a_constant_added_to_all_biases_is_not_sought():
    """It changes nothing; rounding gave it a tiny curvature once, and a step of any length."""
    torch.manual_seed(0)
    problem = Problem(torch.randn(1, 799, 16), torch.arange(799)[None] % 10, 10)
    for seed in range(20):
        torch.manual_seed(seed)
        shares = (0.001 * torch.randn(1, 799, 10)).softmax(dim=2)
        inverse = problem.preconditioner(shares, problem.penalty(1e6))
        found = inverse(Point(torch.zeros(1, 16, 10), torch.ones(1, 1, 10)))
        assert found.bias.abs().max() < 1e-3
