"""The paper's metrics against scikit-learn, to 1e-9."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from diptych.evaluate.metrics.measures import (
    METRICS,
    accuracy,
    average_precision,
    average_precision_11,
    bootstrap_interval,
    chance,
    map_11_point,
    mean_average_precision,
    mean_per_class_recall,
    mean_top1_top5,
    pm_k,
    roc_auc,
    wilson_interval,
)

CLOSE = {"abs": 1e-9, "rel": 1e-9}


def drawn(seed, images=200, classes=7, coarse=False):
    """Scores that know something, and labels; `coarse` ones have many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    scores = rng.normal(size=(images, classes)) + 1.2 * np.eye(classes)[labels]
    return (np.round(scores) if coarse else scores).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(5))
def test_accuracies_are_scikit_learns(seed):
    scores, labels = drawn(seed)
    s, y = torch.from_numpy(scores), torch.from_numpy(labels)
    top1 = theirs.top_k_accuracy_score(labels, scores, k=1, labels=range(7))
    top5 = theirs.top_k_accuracy_score(labels, scores, k=5, labels=range(7))
    assert accuracy(s, y) == pytest.approx(top1, **CLOSE)
    assert METRICS["acc5"](s, y) == pytest.approx(top5, **CLOSE)
    assert mean_top1_top5(s, y) == pytest.approx((top1 + top5) / 2, **CLOSE)
    balanced = theirs.balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert mean_per_class_recall(s, y) == pytest.approx(balanced, **CLOSE)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_roc_auc_is_scikit_learns_with_ties_too(seed, coarse):
    scores, labels = drawn(seed, classes=2, coarse=coarse)
    expected = theirs.roc_auc_score(labels, scores[:, 1].astype(np.float64) - scores[:, 0])
    assert roc_auc(torch.from_numpy(scores), torch.from_numpy(labels)) == pytest.approx(expected, **CLOSE)


def test_roc_auc_of_one_class_is_no_number():
    assert math.isnan(roc_auc(torch.rand(5, 2), torch.ones(5, dtype=torch.int64)))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns(seed):
    scores, labels = drawn(seed)
    targets = np.eye(7)[labels] + (np.random.default_rng(seed + 99).random((200, 7)) < 0.1) > 0
    for c in range(7):
        expected = theirs.average_precision_score(targets[:, c], scores[:, c])
        found = average_precision(torch.from_numpy(scores[:, c]), torch.from_numpy(targets[:, c]).float())
        assert found == pytest.approx(expected, **CLOSE)
    expected = theirs.average_precision_score(targets, scores, average="macro")
    found = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets).float())
    assert found == pytest.approx(expected, **CLOSE)


def eleven(targets, scores):
    """By its definition, from scikit-learn's curve, without the point that it puts at recall 0."""
    precision, recall = (values[:-1] for values in theirs.precision_recall_curve(targets, scores)[:2])
    return np.mean([precision[recall >= level / 10 - 1e-12].max() for level in range(11)])


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_eleven_points_are_read_off_scikit_learns_curve(seed, coarse):
    scores, labels = drawn(seed, coarse=coarse)
    targets = np.eye(7)[labels]
    values = []
    for c in range(7):
        expected = eleven(targets[:, c], scores[:, c])
        found = average_precision_11(torch.from_numpy(scores[:, c]), torch.from_numpy(targets[:, c]))
        assert found == pytest.approx(expected, **CLOSE)
        values.append(expected)
    found = map_11_point(torch.from_numpy(scores), torch.from_numpy(targets).float())
    assert found == pytest.approx(np.mean(values), **CLOSE)


def test_eleven_points_of_a_hand_made_ranking():
    """Positives at places 1 and 4 of 5: precision 1 up to recall 0.5, 2 / 4 behind it."""
    scores, targets = torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([1, 0, 0, 1, 0])
    assert average_precision_11(scores, targets) == pytest.approx((6 * 1 + 5 * 0.5) / 11)


def test_a_class_without_positives_does_not_count():
    scores, targets = torch.rand(10, 3), torch.zeros(10, 3)
    targets[:5, 0] = targets[3:, 1] = 1
    assert math.isnan(average_precision(scores[:, 2], targets[:, 2]))
    expected = (average_precision(scores[:, 0], targets[:, 0]) + average_precision(scores[:, 1], targets[:, 1])) / 2
    assert mean_average_precision(scores, targets) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_average_precisions_stay_between_0_and_1(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    targets = torch.tensor([int(target) for _, target in rows])
    for metric in (average_precision, average_precision_11):
        value = metric(scores, targets)
        assert 0 <= value <= 1 if targets.any() else math.isnan(value)


def test_pm_k_wants_all_neighbours():
    sets = {"a": ["a1", "a2"], "b": ["b1"], "c": [], "d": ["d1"]}
    labels = {"a": [0, 1], "b": [2], "c": [3], "d": [4], "d1": [5]}
    right = {"a": 0, "a1": 1, "a2": 0, "b": 2, "b1": 0, "c": 0, "d": 4, "d1": 5}
    assert pm_k(right, labels, sets) == (0.75, 0.5)  # b1 is wrong, c is wrong; d1 has a label of its own
    assert pm_k(right | {"d1": 4}, labels, sets) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("metric", "value"),
    [("acc1", 0.1), ("mean_per_class_recall", 0.1), ("acc5", 0.5), ("mean_top1_top5", 0.3), ("roc_auc", 0.5)],
)
def test_chance_is_what_guessing_reaches(metric, value):
    assert chance(metric, 10) == pytest.approx(value)
    classes = 2 if metric == "roc_auc" else 10
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (20_000,), generator=generator)
    guess = METRICS[metric](torch.rand(20_000, classes, generator=generator), labels)
    assert guess == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("images", [200, 20_000])
def test_chance_of_rankings_is_about_the_share_of_positives(images):
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(images, 3, generator=generator) < torch.tensor([0.1, 0.2, 0.6])).float()
    scores = torch.rand(images, 3, generator=generator)
    for metric in ("map_11_point", "mean_average_precision"):
        assert METRICS[metric](scores, targets) == pytest.approx(chance(metric, 3, targets), abs=0.05)
    assert chance("mean_average_precision", 3, targets) == pytest.approx(0.3, abs=0.05)


def test_the_bootstrap_of_a_share_is_near_wilsons():
    hits = (torch.arange(500) % 10 < 7).double()
    low, high = bootstrap_interval(lambda rows: hits[rows].mean().item(), 500, draws=4000)
    assert (low, high) == pytest.approx(wilson_interval(0.7, 500), abs=0.006)
    assert bootstrap_interval(lambda rows: hits[rows].mean().item(), 500, draws=50) == bootstrap_interval(
        lambda rows: hits[rows].mean().item(), 500, draws=50
    )
