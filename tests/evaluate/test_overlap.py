"""The statistics of a data overlap, against scipy and by hand."""

import math

import pytest
from scipy import stats

from diptych.errors import UsageError
from diptych.evaluate.metrics.overlap import at_least, bonferroni, clopper_pearson, measure_overlap

CASES = [(0, 1), (1, 1), (0, 12), (5, 12), (12, 12), (97, 100), (1, 5000), (2500, 5000), (4999, 5000)]


@pytest.mark.parametrize(("hits", "trials"), CASES)
def test_the_interval_is_the_exact_one(hits, trials):
    expected = stats.binomtest(hits, trials).proportion_ci(0.995, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("hits", "trials"), CASES)
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.97])
def test_the_tail_is_that_of_the_binomial_test(hits, trials, p):
    expected = stats.binomtest(hits, trials, p, alternative="greater").pvalue
    assert at_least(hits, trials, p) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_a_set_is_divided_by_what_was_seen():
    correct = {f"clean-{i}": i < 50 for i in range(100)} | {f"seen-{i}": i < 18 for i in range(20)}
    overlap = measure_overlap(correct, [f"seen-{i}" for i in range(20)])
    assert (overlap.images, overlap.overlapping, overlap.share) == (120, 20, 20 / 120)
    assert (overlap.acc_all, overlap.acc_clean, overlap.acc_overlap) == (68 / 120, 0.5, 0.9)
    assert overlap.gained == pytest.approx(68 / 120 - 0.5)
    assert overlap.p_value == pytest.approx(stats.binomtest(18, 20, 0.5, alternative="greater").pvalue)
    assert overlap.interval[0] < 0.9 < overlap.interval[1]


def test_no_overlap_adds_nothing_and_a_whole_one_has_no_clean_rest():
    correct = {"a": True, "b": False}
    none = measure_overlap(correct, [])
    assert (none.gained, none.p_value, none.interval) == (0.0, 1.0, (0.0, 1.0))
    assert math.isnan(none.acc_overlap)
    whole = measure_overlap(correct, ["a", "b"])
    assert math.isnan(whole.acc_clean)
    assert (whole.acc_overlap, whole.p_value) == (0.5, 1.0)


def test_keys_of_another_set_are_refused():
    with pytest.raises(UsageError, match=r"1 keys of the overlap are not among the 1 answers \(x"):
        measure_overlap({"a": True}, ["a", "x"])
    with pytest.raises(UsageError, match="evaluate the set first"):
        measure_overlap({}, [])


def test_many_sets_are_corrected_for_their_number():
    assert bonferroni([0.001, 0.02, 0.5]) == [0.003, 0.06, 1.0]
