"""Few-shot probes of ImageNet under its shifts, with scikit-learn's regression as the probe."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import made_up_results as made
from diptych.errors import UsageError
from diptych.evaluate.adapt import Shift, adapt_few_shot, few_shot_result
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


def test_few_shot_probes_are_measured_the_same_way(data):
    train, labels, shifts = data
    found = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(1, 8), seeds=3)
    assert {name: {count: len(draws) for count, draws in of_shift.items()} for name, of_shift in found.items()} == {
        "imagenet_a": {1: 3, 8: 3},
        "objectnet": {1: 3, 8: 3},
    }
    assert np.mean(found["imagenet_a"][8]) > np.mean(found["imagenet_a"][1])
    whole = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(600,), seeds=1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    order = torch.cat([order[labels[order] == label] for label in range(CLASSES)])
    for name, columns in (("imagenet_a", [[4], [1]]), ("objectnet", [[3, 2], [0, 5]])):
        scores = regression(train[order], labels[order], shifts[name].features, labels[:1], classes=CLASSES).predictions
        pooled = torch.stack([scores[:, group].amax(dim=1) for group in columns], dim=1)
        assert whole[name][600] == (accuracy(pooled, shifts[name].labels),)


def test_results_are_what_figure_15_looks_for(data, tmp_path):
    train, labels, shifts = data
    save_model(tmp_path, made.facts("clip", "runs/clip", 1.0))
    for dataset in ("imagenet", *shifts):
        made.save(tmp_path, "clip", dataset, "zeroshot", 0.5, metric="acc1")
    made.save(tmp_path, "clip", "imagenet", "fewshot", 0.6, details={"shots": {"1": [0.4], "8": [0.5]}})
    values = adapt_few_shot(few, train, labels, shifts, classes=CLASSES, shots=(1, 8), seeds=2)
    for name, of_shift in values.items():
        sizes = {"metric": "acc1", "images": len(shifts[name].labels), "train_images": 600}
        save_result(tmp_path, few_shot_result("clip", name, of_shift, **sizes))
    path = FIGURES["15"](load_study(tmp_path))
    assert isinstance(path, Chart)
    marks = path.panels[0].series[0].marks
    assert [mark.label for mark in marks] == ["zero-shot", "1-shot", "8-shot"]
    assert (marks[1].x, marks[1].y) == (0.4, pytest.approx(np.mean([np.mean(v[1]) for v in values.values()])))


@pytest.mark.parametrize(
    ("groups", "labels", "said"),
    [([[0]], 2, "beyond its 1 classes"), ([[0]], 1, "needs a label")],
)
def test_shifts_that_do_not_fit_are_refused(groups, labels, said):
    shift = Shift(features=torch.zeros(2, 8), labels=torch.arange(labels), groups=groups)
    with pytest.raises(UsageError, match=said):
        adapt_few_shot(few, torch.zeros(2, 8), torch.arange(2), {"imagenet_a": shift}, classes=2, shots=(1,))
    with pytest.raises(UsageError, match="no shift"):
        adapt_few_shot(few, torch.zeros(2, 8), torch.arange(2), {}, classes=2, shots=(1,))
