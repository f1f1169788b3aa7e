import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from diptych.errors import DatasetError
from diptych.evaluate.metrics.assignment import assign, find_permutation
from diptych.evaluate.metrics.classification import (
    best_class,
    calibration,
    calibration_error,
    check_scores,
    fit_temperature,
    score_multi,
    score_single,
)
from diptych.evaluate.metrics.measures import accuracy

NAMES = [f"class {i}" for i in range(10)]


def scores_of(images=2000, classes=10, strength=2.0, seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes if labels is None else labels
    scores = torch.randn(images, classes, generator=generator)
    scores[torch.arange(images), labels] += strength
    return scores, labels


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_assignment_is_as_good_as_scipys(size, levels):
    for seed in range(5):
        gain = np.random.default_rng(seed).integers(0, levels, (size, size)).astype(np.float64)
        rows, columns = linear_sum_assignment(gain, maximize=True)
        ours = assign(gain)
        assert sorted(ours) == list(range(size))
        assert gain[np.arange(size), ours].sum() == gain[rows, columns].sum()


def test_permuted_labels_are_found_and_named():
    scores, labels = scores_of()
    permuted = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])[labels]
    scored = score_single(scores, permuted, NAMES, "acc1")
    (chance, warning) = scored.warnings
    assert "below chance" in chance
    assert warning.startswith("labels look permuted: with 10 classes in another order")
    assert "class 1 -> class 0" in warning
    found = find_permutation(best_class(scores), permuted, 10)
    assert found.columns == (9, 0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert found.after == pytest.approx(accuracy(scores, labels), abs=0.05)


def test_two_classes_that_are_swapped_are_enough():
    scores, labels = scores_of()
    swapped = torch.tensor([0, 1, 2, 4, 3, 5, 6, 7, 8, 9])[labels]
    found = find_permutation(best_class(scores), swapped, 10)
    assert found.moved == [3, 4]
    assert "class 3 -> class 4, class 4 -> class 3)" in score_single(scores, swapped, NAMES, "acc1").warnings[0]


@pytest.mark.parametrize("strength", [0.0, 0.2, 2.0])
@pytest.mark.parametrize("images", [20, 60, 2000])
def test_labels_that_are_right_or_unknown_are_not_suspected(images, strength):
    for seed in range(10):
        scores, labels = scores_of(images, strength=strength, seed=seed)
        assert find_permutation(best_class(scores), labels, 10) is None


def test_guessing_is_flagged_and_knowing_is_not():
    scores, labels = scores_of(strength=0.0)
    scored = score_single(scores, labels, NAMES, "acc1")
    assert "at chance (10.0%)" in scored.warnings[0]
    assert score_single(*scores_of(), NAMES, "acc1").warnings == []
    below = score_single(scores, scores.argmin(dim=1), NAMES, "acc1")
    assert "below chance" in below.warnings[0]


def test_a_class_without_pictures_is_named_and_has_no_recall():
    scores, labels = scores_of(labels=torch.arange(2000) % 9)
    scored = score_single(scores, labels, NAMES, "mean_per_class_recall")
    assert scored.warnings == ["1 of 10 classes have no picture: class 9"]
    assert scored.per_class[9] == {"name": "class 9", "images": 0, "recall": None}
    recalls = [entry["recall"] for entry in scored.per_class[:9]]
    assert scored.value == pytest.approx(sum(recalls) / 9)


@pytest.mark.parametrize("metric", ["acc1", "acc5", "mean_per_class_recall", "mean_top1_top5"])
def test_the_interval_is_around_the_value(metric):
    scored = score_single(*scores_of(600, strength=1.0), NAMES, metric)
    low, high = scored.ci95
    assert 0 < low < scored.value < high < 1
    assert high - low < 0.12
    assert scored.metrics[metric] == scored.value


def test_scores_that_are_no_numbers_are_refused():
    scores, _ = scores_of(10)
    check_scores(scores, "set")
    scores[3, 2] = math.nan
    scores[5, 1] = math.inf
    with pytest.raises(DatasetError, match="set: 2 of 10 pictures have scores that are NaN or infinite"):
        check_scores(scores, "set")


def test_of_equal_scores_the_first_class_counts():
    assert best_class(torch.tensor([[1.0, 2, 2], [0, 0, 0]])).tolist() == [1, 0]


def test_confusion_is_kept_for_few_classes():
    scores, labels = scores_of()
    table = np.array(score_single(scores, labels, NAMES, "acc1").details["confusion"])
    assert table.sum() == 2000
    assert np.trace(table) / 2000 == accuracy(scores, labels)
    many = scores_of(600, classes=60)
    assert "confusion" not in score_single(*many, [str(i) for i in range(60)], "acc1").details


def calibrated(images=20_000, seed=0):
    """Labels that are drawn from what the scores believe."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(images, 5, generator=generator, dtype=torch.float64)
    return scores, torch.multinomial(scores.softmax(dim=1), 1, generator=generator)[:, 0]


def test_temperature_undoes_what_scores_were_multiplied_with():
    scores, labels = calibrated()
    assert fit_temperature(scores, labels) == pytest.approx(1.0, abs=0.03)
    assert fit_temperature(3 * scores, labels) == pytest.approx(3 * fit_temperature(scores, labels), rel=1e-3)
    found = calibration(3 * scores, labels)
    assert found["ece"] > 0.1
    assert found["ece_tempered"] < 0.01
    assert found["nll_tempered"] < found["nll"]


def test_calibration_error_by_hand():
    """Three pictures believed with 1, two of them rightly: |1 - 2 / 3|; one with 1/2, wrongly: 1/2."""
    scores = torch.tensor([[50.0, 0], [50, 0], [50, 0], [0, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert calibration_error(scores, labels) == pytest.approx((3 * (1 / 3) + 0.5) / 4)


def test_softmax_changes_the_ranking_of_several_labels():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(300, 4, generator=generator) < 0.3).float()
    scores = torch.randn(300, 4, generator=generator) + targets + 3 * torch.randn(300, 1, generator=generator)
    with_softmax = score_multi(scores, targets, NAMES[:4], "map_11_point")
    without = score_multi(scores, targets, NAMES[:4], "map_11_point", softmax=False)
    assert with_softmax.value > without.value + 0.05  # what pictures share in all their scores says nothing
    assert with_softmax.ci95[0] < with_softmax.value < with_softmax.ci95[1]
