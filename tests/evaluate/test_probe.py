"""The paper's linear probe against the same search around scikit-learn, and what it refuses."""

import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from diptych.embed.bulk.folder import write_features
from diptych.errors import UsageError
from diptych.evaluate.metrics.measures import accuracy, mean_average_precision, mean_per_class_recall
from diptych.evaluate.probe.config import ProbeConfig
from diptych.evaluate.probe.fewshot import few_shot
from diptych.evaluate.probe.search import hold_out, linear_probe, search
from reference import probe as plain


def digits():
    """Real pictures: (train, labels), (val, labels), (test, labels) of pixels."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(pixels).float()[order] + 0.0, torch.from_numpy(labels).long()[order]
    return [(pixels[a:b], labels[a:b]) for a, b in ((0, 700), (700, 1000), (1000, 1797))]


def mixture(pictures, columns=16, classes=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, columns, generator=random)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (pictures - classes,), generator=random)])
    return centres[labels] + 1.5 * torch.randn(pictures, columns, generator=random), labels


def parts(features, labels, *ends):
    return [(features[a:b], labels[a:b]) for a, b in zip((0, *ends), (*ends, len(labels)), strict=True)]


def twin(train, val, test, metric):
    def measure(model, features, labels):
        scores = torch.from_numpy(model.decision_function(features))
        return metric(scores, torch.from_numpy(labels))

    arrays = [part.numpy() for pair in (train, val, test) for part in (pair[0].double(), pair[1])]
    return plain.search(*arrays, measure, solver="newton-cholesky", tol=1e-10, max_iter=1000)


@pytest.mark.parametrize("metric", [accuracy, mean_per_class_recall])
@pytest.mark.parametrize("drawn", ["digits", "mixture"])
def test_the_search_is_scikit_learns(drawn, metric):
    train, val, test = digits() if drawn == "digits" else parts(*mixture(900), 300, 500)
    l2, value, tried = twin(train, val, test, metric)
    classes = int(train[1].max()) + 1
    report = linear_probe(*train, *test, classes=classes, val=val, metric=metric)
    assert report.l2 == pytest.approx(l2)
    assert report.value == pytest.approx(value, abs=0.001)
    assert report.converged
    ours, theirs = sorted(report.validation), sorted(tried.items())
    assert [l2 for l2, _ in ours] == pytest.approx([l2 for l2, _ in theirs])
    assert [found for _, found in ours] == pytest.approx([found for _, found in theirs], abs=1e-6)
    assert report.train_images == len(train[1]) + len(val[1])
    assert accuracy(report.predictions, test[1]) == accuracy(test[0].double() @ report.weight.T + report.bias, test[1])


def test_at_most_fifteen_strengths_of_the_grid_are_tried():
    for peak in (-48, -47, -31, -3, 0, 1, 5, 29, 48):
        tried = search(lambda l2, peak=peak: -abs(math.log10(l2) * 8 - peak))
        eighths = [math.log10(l2) * 8 for l2, _ in tried]
        assert all(abs(place - round(place)) < 1e-9 and abs(place) <= 48 for place in eighths)
        assert len({round(place) for place in eighths}) == len(tried) <= 15
        assert peak in map(round, eighths)  # of a single peak it finds the top


def test_of_equal_strengths_the_strongest_is_taken():
    train, val, test = parts(*mixture(300, columns=40, classes=2), 100, 200)
    far = [(features + 50 * labels[:, None], labels) for features, labels in (train, val, test)]
    report = linear_probe(*far[0], *far[2], classes=2, val=far[1])
    best = max(value for _, value in report.validation)
    assert report.l2 == max(l2 for l2, value in report.validation if value == best)


def test_without_validation_pictures_some_of_each_class_are_held_out():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    held_out = hold_out(labels, 0.2, seed=0)
    assert [int(held_out[labels == label].sum()) for label in range(3)] == [2, 1, 0]
    assert held_out.equal(hold_out(labels, 0.2, seed=0))
    assert any(not held_out.equal(hold_out(labels, 0.2, seed=seed)) for seed in range(1, 5))
    train, test = parts(*mixture(400), 200)
    again = [linear_probe(*train, *test, classes=6, seed=3) for _ in range(2)]
    assert again[0].l2 == again[1].l2
    assert again[0].predictions.equal(again[1].predictions)
    assert again[0].train_images == 200


def test_a_given_strength_is_not_searched_for():
    train, test = parts(*mixture(400), 200)
    report = linear_probe(*train, *test, classes=6, config=ProbeConfig(l2=0.5))
    assert (report.l2, report.validation) == (0.5, ())
    model = plain.fit(train[0].double().numpy(), train[1].numpy(), 0.5, tol=1e-10, max_iter=1000)
    assert report.value == pytest.approx(model.score(test[0].double().numpy(), test[1].numpy()), abs=0.001)


def test_several_things_in_a_picture_are_one_probe_each():
    features, _ = mixture(600)
    random = torch.Generator().manual_seed(5)
    labels = (features @ torch.randn(16, 3, generator=random) + torch.randn(600, 3, generator=random) > 1.5).float()
    train, val, test = parts(features, labels, 300, 450)

    def right(scores, labels):
        return ((scores > 0) == (labels > 0.5)).double().mean().item()

    report = linear_probe(*train, *test, classes=3, val=val, metric=right)
    both = [torch.cat([train[i], val[i]]) for i in range(2)]
    for column in range(3):
        model = plain.fit(both[0].double().numpy(), both[1][:, column].numpy(), report.l2, tol=1e-10, max_iter=1000)
        assert report.weight[column].numpy() == pytest.approx(model.coef_[0], rel=1e-2, abs=1e-3)
    assert report.value > 0.8


def test_features_of_half_precision_are_taken():
    train, test = parts(*mixture(300), 150)
    halves = [(features.half(), labels) for features, labels in (train, test)]
    config = ProbeConfig(l2=1.0)
    values = [linear_probe(*a, *b, classes=6, config=config).value for a, b in ((train, test), halves)]
    assert values[0] == pytest.approx(values[1], abs=0.02)


def refuse(match, train, test, **how):
    with pytest.raises(UsageError, match=match):
        linear_probe(*train, *test, **{"classes": 6, **how})


def test_what_cannot_be_probed_is_named():
    train, test = parts(*mixture(300), 150)
    features, labels = train
    broken = features.clone()
    broken[[17, 40], 3] = torch.tensor([math.nan, math.inf])
    refuse("row 17 of the training features is not finite .2 of 150 in all", (broken, labels), test)
    refuse("row 17 of the test features", train, (torch.cat([broken, features])[: len(test[1])], test[1]))
    refuse("row 17 of the validation features", train, test, val=(broken, labels))
    refuse("1 classes cannot be told apart", (features, labels * 0), test, classes=1)
    refuse("149 training labels for 150 rows", (features, labels[1:]), test)
    refuse("training labels go from 0 to 5; 4 classes are 0 to 3", train, test, classes=4)
    refuse("test features 15", train, (test[0][:, 1:], test[1]))
    refuse("no validation features", train, test, val=(features[:0], labels[:0]))
    refuse("no training features", (features[:0], labels[:0]), test)
    refuse(re.escape("1 of 7 classes have no training picture (class 6)"), train, test, classes=7)
    rare = labels.clone()
    rare[rare == 2] = 3
    refuse(re.escape("1 of 6 classes have no training picture (class 2)"), (features, rare), test)
    refuse("none of the 6 classes has two training pictures", (features[:6], labels[:6]), test)
    several = torch.nn.functional.one_hot(labels, 6).float()
    of_test = torch.nn.functional.one_hot(test[1], 6).float()
    refuse("one column a class", (features, several * 2), (test[0], of_test))
    several[:, 4] = 0
    refuse(
        re.escape("none that does not (class 4)"),
        (features, several),
        (test[0], of_test),
        metric=mean_average_precision,
    )


@pytest.mark.parametrize("settings", [{"l2": 0.0}, {"l2": -1.0}, {"l2": math.inf}, {"val_share": 0.0}])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(UsageError, match=r"l2|val_share"):
        ProbeConfig(**settings)


# --- whatever holds numbers ---

CONFIG = ProbeConfig(l2=1.0)
TYPES = (np.uint8, np.int16, np.int32, np.uint64, np.float32, np.float64, ">i4", np.longdouble)


def ask(train, test, **how):
    """A probe and its few-shot sister."""
    few = few_shot(*train, *test, **{"classes": 6, "shots": (4,), "seeds": 1, **how})
    return linear_probe(*train, *test, **{"classes": 6, "config": CONFIG, **how}).value, few.values


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_labels_of_any_number_type_are_class_numbers(dtype):
    train, test = parts(*mixture(300), 150)
    arrays = [(features.numpy(), labels.numpy().astype(dtype)) for features, labels in (train, test)]
    assert ask(*arrays) == ask(train, test)


def test_lists_and_what_embed_wrote_can_be_probed(tmp_path):
    train, test = parts(*mixture(300), 150)
    lists = [(features.tolist(), labels.tolist()) for features, labels in (train, test)]
    doubles = [(features.double(), labels) for features, labels in (train, test)]
    assert ask(*lists) == ask(*doubles)
    two = [(features.numpy(), labels.numpy() > 2) for features, labels in (train, test)]
    assert ask(*two, classes=2) == ask(*((f, torch.from_numpy(y).long()) for f, y in two), classes=2)
    names = [str(i) for i in range(300)]
    write_features(tmp_path, "part", "parquet", "here", names, torch.cat([train[0], test[0]]).numpy())
    found = (
        pq.read_table(tmp_path / "part.parquet").column("feature").to_numpy()
    )  # as pandas has it: arrays in an array
    assert ask((found[:150], train[1]), (found[150:], test[1])) == ask(train, test)


def test_several_things_in_a_picture_may_be_of_any_number_type():
    train, test = parts(*mixture(300), 150)
    shown = [(features, torch.nn.functional.one_hot(labels, 6)) for features, labels in (train, test)]
    values = [
        linear_probe(*a, *b, classes=6, config=CONFIG, metric=mean_average_precision).value
        for a, b in (
            [(f, of(y)) for f, y in shown] for of in (torch.Tensor.float, torch.Tensor.bool, torch.Tensor.numpy)
        )
    ]
    assert values[0] == values[1] == values[2]
    refuse("have no accuracy; give another metric", *shown)
    refuse("must both be class numbers", shown[0], test, metric=mean_average_precision)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["cat"] * 150, "training labels are no table of numbers .they are <U3"),
        ([None] * 150, "training labels are no table of numbers .they are object"),
        ([[1], [2, 3]] * 75, "training labels are no table of numbers"),
        ([1.5] * 150, "row 0 of the training labels is 1.5, which is no class's number"),
        ([0.0] * 149 + [math.nan], "row 149 of the training labels is nan"),
        (np.zeros((150, 2, 2)), "training labels have the shape .150, 2, 2."),
        ([-1] * 150, "training labels go from -1"),
    ],
)
def test_labels_that_are_no_class_numbers_are_named(labels, match):
    (features, _), test = parts(*mixture(300), 150)
    refuse(match, (features, labels), test)
    with pytest.raises(UsageError, match=match):
        few_shot(features, labels, *test, classes=6)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e30])
def test_features_beside_which_no_penalty_is_one_are_refused(scale):
    """An optimum was claimed where float64 could not see one: 9.9 % of the digits, where scaled features give 93 %."""
    train, _, test = digits()
    large = [(features.double() * scale / 16, labels) for features, labels in (train, test)]
    refuse("scale them, say by their standard deviation", *large, classes=10)
    fixed = ProbeConfig(l2=scale**2)
    assert linear_probe(*large[0], *large[1], classes=10, config=fixed).value > 0.9
    huge = [(features.double() * 1e200, labels) for features, labels in (train, test)]
    refuse("too large for float64", *huge, classes=10)
