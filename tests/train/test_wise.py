"""Between two models, and what was won and lost."""

import dataclasses

import pytest
import torch

from diptych.checkpoint.loaded import Loaded
from diptych.errors import UsageError
from diptych.train.finetune import guard, wise_ft
from samples import SMALL_VOCABULARY, TINY_RESNET, TINY_VIT, make_loaded


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_the_ends_are_the_two_models_and_the_middle_is_their_mean(config):
    start, tuned = make_loaded(config).model, make_loaded(config, seed=1).model
    for alpha, expected in ((0.0, start), (1.0, tuned)):
        found = wise_ft.interpolate(start, tuned, alpha).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    a, b = start.state_dict(), tuned.state_dict()
    for name, tensor in wise_ft.interpolate(start, tuned, 0.5).state_dict().items():
        assert torch.equal(tensor, (a[name] + b[name]) / 2 if tensor.is_floating_point() else b[name]), name


def test_the_two_models_are_not_changed_by_what_lies_between():
    start, tuned = make_loaded(TINY_VIT).model, make_loaded(TINY_VIT, seed=1).model
    with torch.no_grad():
        wise_ft.interpolate(start, tuned, 0.0).visual.proj.zero_()
    assert start.visual.proj.abs().sum() > 0


def test_the_whole_curve_is_asked_and_the_best_point_is_chosen():
    start, tuned = make_loaded(TINY_VIT).model, make_loaded(TINY_VIT, seed=1).model
    wanted = wise_ft.interpolate(start, tuned, 0.4).visual.proj

    def evaluator(model):
        return {"a/acc1": float(torch.equal(model.visual.proj, wanted)), "a/images": 7.0}

    points = wise_ft.sweep(start, tuned, [evaluator])
    assert [point.alpha for point in points] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert wise_ft.choose(points).alpha == 0.4


def test_of_equal_points_the_one_nearest_to_the_start_is_chosen():
    points = [wise_ft.Point(alpha=alpha, score=0.5, metrics={}) for alpha in wise_ft.ALPHAS]
    assert wise_ft.choose(points).alpha == 0


def test_each_evaluation_counts_once():
    metrics = {"a/acc1": 0.8, "a/acc5": 1.0, "a/images": 100.0, "b/custom": 0.3}
    metrics |= {"r/image_retrieval_recall@1": 0.2, "r/text_retrieval_recall@1": 0.4, "r/text_retrieval_recall@5": 1.0}
    assert wise_ft.score(metrics) == pytest.approx((0.8 + 0.3 + 0.3) / 3)


def test_models_that_are_not_on_one_line_are_refused():
    start = make_loaded(TINY_VIT)
    other = Loaded(start.model, dataclasses.replace(start.preprocess, mean=(0.5, 0.5, 0.5)), SMALL_VOCABULARY)
    with pytest.raises(UsageError, match="other tokenizers and preprocessing; name a model and what was fine-tuned"):
        wise_ft.require_same_kind(start, other)
    with pytest.raises(UsageError, match="other sizes"):
        wise_ft.require_same_kind(start, make_loaded(TINY_RESNET))


def test_changes_are_points_of_shares_and_counts_are_left_out():
    start = {"a/acc1": 0.5, "a/images": 10.0, "a/skipped": 0.0, "b/acc1": 0.25}
    now = {"a/acc1": 0.75, "a/images": 9.0, "a/skipped": 1.0, "b/acc1": 0.125, "new/acc1": 1.0}
    assert [(change.name, change.points) for change in guard.changes(start, now)] == [("a/acc1", 25), ("b/acc1", -12.5)]
    assert [change.name for change in guard.lost(start, now, 12.0)] == ["b/acc1"]
    assert guard.lost(start, now, 12.5) == []
    assert guard.lost(start, now, None) == []
