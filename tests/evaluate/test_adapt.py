"""Probes of ImageNet under its shifts, with scikit-learn's regression as the probe."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import made_up_results as made
from diptych.errors import UsageError
from diptych.evaluate.adapt import Shift, adapt_few_shot, adapt_probe, few_shot_result, probe_result
from diptych.evaluate.charts import Chart
from diptych.evaluate.figures import FIGURES
from diptych.evaluate.metrics import accuracy
from diptych.evaluate.results import save_model, save_result
from diptych.evaluate.study import load_study

linear_model = pytest.importorskip("sklearn.linear_model")
CLASSES = 6


def regression(train, train_labels, test, test_labels, *, classes, val=None, seed=0):
    """What `linear_probe` promises, by scikit-learn; labels have to be of ImageNet's classes."""
    assert int(test_labels.max()) < classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = linear_model.LogisticRegression(max_iter=300).fit(train.numpy(), train_labels.numpy())
    return SimpleNamespace(predictions=torch.from_numpy(fitted.decision_function(test.numpy())))


def few(train, train_labels, test, test_labels, *, classes, shots, seeds, metric):
    values = {}
    for count in shots:
        draws = []
        for seed in range(seeds):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            rows = torch.cat([order[train_labels[order] == label][:count] for label in range(classes)])
            report = regression(train[rows], train_labels[rows], test, test_labels, classes=classes)
            draws.append(metric(report.predictions, test_labels))
        values[count] = tuple(draws)
    return SimpleNamespace(values=values)


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    centres = 2.5 * generator.normal(size=(CLASSES, 8))

    def pictures(classes, count, shift):
        labels = generator.integers(0, len(classes), count)
        features = centres[np.array(classes)[labels]] + generator.normal(size=(count, 8)) + shift
        return torch.from_numpy(features), torch.from_numpy(labels)

    train, labels = pictures(range(CLASSES), 600, 0)
    a, of_a = pictures([4, 1], 80, 0.5)
    pooled, of_pooled = pictures([2], 50, 0.3)
    shifts = {
        "imagenet_a": Shift(features=a, labels=of_a, groups=[[4], [1]]),
        "objectnet": Shift(features=pooled, labels=of_pooled, groups=[[3, 2], [0, 5]]),
    }
    return train, labels, shifts


def test_a_probe_is_asked_among_the_classes_of_each_shift(data):
    train, labels, shifts = data
    found = adapt_probe(regression, train, labels, shifts, classes=CLASSES)
    scores = regression(train, labels, shifts["imagenet_a"].features, torch.tensor([0]), classes=CLASSES).predictions
    assert found["imagenet_a"] == accuracy(scores[:, [4, 1]], shifts["imagenet_a"].labels)
    assert found["imagenet_a"] > accuracy(scores, torch.tensor([4, 1])[shifts["imagenet_a"].labels])
    scores = regression(train, labels, shifts["objectnet"].features, torch.tensor([0]), classes=CLASSES).predictions
    right = scores[:, [3, 2]].amax(dim=1) > scores[:, [0, 5]].amax(dim=1)
    assert found["objectnet"] == right.double().mean().item()


def test_few_shot_probes_are_measured_the_same_way(data):
    train, labels, shifts = data
    found = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(1, 8), seeds=3)
    assert {name: {count: len(draws) for count, draws in of_shift.items()} for name, of_shift in found.items()} == {
        "imagenet_a": {1: 3, 8: 3},
        "objectnet": {1: 3, 8: 3},
    }
    assert np.mean(found["imagenet_a"][8]) > np.mean(found["imagenet_a"][1])
    whole = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(600,), seeds=1)
    assert whole["objectnet"][600] == (adapt_probe(regression, train, labels, shifts, classes=CLASSES)["objectnet"],)


def test_results_are_what_figures_14_and_15_look_for(data, tmp_path):
    train, labels, shifts = data
    save_model(tmp_path, made.facts("clip", "runs/clip", 1.0))
    for dataset in ("imagenet", *shifts):
        made.save(tmp_path, "clip", dataset, "zeroshot", 0.5, metric="acc1")
    made.save(tmp_path, "clip", "imagenet", "probe", 0.6, details={"train_images": 600})
    made.save(tmp_path, "clip", "imagenet", "fewshot", 0.6, details={"shots": {"1": [0.4], "8": [0.5]}})
    values = adapt_probe(regression, train, labels, shifts, classes=CLASSES)
    few_values = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(1, 8), seeds=2)
    for name, value in values.items():
        sizes = {"metric": "acc1", "images": len(shifts[name].labels), "train_images": 600}
        save_result(tmp_path, probe_result("clip", name, value, **sizes))
        save_result(tmp_path, few_shot_result("clip", name, few_values[name], **sizes))
    study = load_study(tmp_path)
    changes, path = FIGURES["14"](study), FIGURES["15"](study)
    assert isinstance(changes, Chart)
    assert isinstance(path, Chart)
    assert {bar.label: bar.value for bar in changes.panels[0].bars} == pytest.approx(
        {"imagenet": 0.1, **{name: value - 0.5 for name, value in values.items()}}
    )
    assert [mark.label for mark in path.panels[0].series[0].marks] == ["zero-shot", "1-shot", "8-shot", "all"]


@pytest.mark.parametrize(
    ("groups", "labels", "said"),
    [([[0], []], 2, "at least one of ImageNet's"), ([[0]], 2, "beyond its 1 classes"), ([[0]], 1, "needs a label")],
)
def test_shifts_that_do_not_fit_are_refused(groups, labels, said):
    shift = Shift(features=torch.zeros(2, 8), labels=torch.arange(labels), groups=groups)
    with pytest.raises(UsageError, match=said):
        adapt_probe(regression, torch.zeros(2, 8), torch.arange(2), {"imagenet_a": shift}, classes=2)
    with pytest.raises(UsageError, match="no shift"):
        adapt_probe(regression, torch.zeros(2, 8), torch.arange(2), {}, classes=2)
