"""A few pictures a class: the same draws again, each solved as if it were alone, and Figure 7's interpolation."""

import pytest
import torch

from diptych.errors import UsageError
from diptych.evaluate.probe import fewshot
from diptych.evaluate.probe.config import FewShotConfig
from diptych.evaluate.probe.fewshot import batches, data_efficiency, draw, few_shot, mean_square
from reference import probe as plain


def mixture(pictures, columns=24, classes=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, columns, generator=random)
    labels = torch.randint(classes, (pictures,), generator=random)
    return centres[labels] + 1.5 * torch.randn(pictures, columns, generator=random), labels


def shown(labels, classes=5):
    return torch.nn.functional.one_hot(labels, classes)


TRAIN, TEST = mixture(400), mixture(500)


def test_each_draw_is_scikit_learns_fit_of_those_pictures():
    report = few_shot(*TRAIN, *TEST, classes=5, shots=(1, 3, 16), seeds=3)
    assert report.converged
    assert report.l2 == pytest.approx(1e-3 * mean_square(TRAIN[0]))
    assert report.train_images == {1: 5, 3: 15, 16: 80}
    for shots, values in report.values.items():
        for seed, value in enumerate(values):
            rows = draw(shown(TRAIN[1]), shots, seed)
            x, y = TRAIN[0][rows].double().numpy(), TRAIN[1][rows].numpy()
            model = plain.fit(x, y, report.l2, solver="newton-cholesky", tol=1e-12, max_iter=1000)
            assert value == pytest.approx(model.score(TEST[0].double().numpy(), TEST[1].numpy()), abs=0.003)
    means = report.means()
    assert means[1] < means[3] < means[16]


def test_a_draw_has_its_shots_of_each_class_and_grows_with_them():
    shows = shown(TRAIN[1])
    for seed in range(3):
        rows = {shots: draw(shows, shots, seed) for shots in (1, 2, 4, 8)}
        for shots, drawn in rows.items():
            assert shows[drawn].sum(dim=0).tolist() == [shots] * 5
            assert drawn.equal(draw(shows, shots, seed))
        for fewer, more in ((1, 2), (2, 4), (4, 8)):
            assert set(rows[fewer].tolist()) < set(rows[more].tolist())
    assert not draw(shows, 4, 0).equal(draw(shows, 4, 1))


def test_seeds_do_not_depend_on_how_many_there_are(monkeypatch):
    few = few_shot(*TRAIN, *TEST, classes=5, shots=(2,), seeds=2).values[2]
    many = few_shot(*TRAIN, *TEST, classes=5, shots=(4, 2), seeds=6).values[2]
    assert many[:2] == few
    monkeypatch.setattr(fewshot, "_TOGETHER", 1)  # each alone
    assert few_shot(*TRAIN, *TEST, classes=5, shots=(2,), seeds=6).values[2] == pytest.approx(many, abs=0.003)


def test_batches_hold_draws_of_one_size():
    rows = [torch.arange(size) for size in (3, 3, 3, 2, 3)]
    assert [len(batch) for batch in batches(rows, 4, 2)] == [3, 1, 1]
    assert [len(batch) for batch in batches(rows, 2**25, 2)] == [1, 1, 1, 1, 1]


def test_shots_that_a_class_has_not_are_left_out_and_counted():
    features, labels = TRAIN
    keep = (labels > 1) | (torch.arange(len(labels)) < 40)
    counts = torch.bincount(labels[keep])
    assert counts[:2].max() < 16 <= counts[2:].min()
    report = few_shot(features[keep], labels[keep], *TEST, classes=5, shots=(2, 16), seeds=2)
    assert report.skipped == {16: 2}
    assert list(report.values) == [2]


def test_several_things_in_a_picture():
    random = torch.Generator().manual_seed(1)
    turn = torch.randn(24, 4, generator=random)
    (train, _), (test, _) = TRAIN, TEST
    labels, answers = ((features @ turn > 3).float() for features in (train, test))

    def right(scores, labels):
        return ((scores > 0) == (labels > 0.5)).double().mean().item()

    report = few_shot(train, labels, test, answers, classes=4, shots=(2, 16), seeds=3, metric=right)
    assert report.train_images[2] <= 8
    assert 0.5 < report.means()[2] < report.means()[16]
    rows = draw(labels > 0.5, 2, 0)
    assert (labels[rows].sum(dim=0) >= 2).all()


def test_what_cannot_be_drawn_is_named():
    features, labels = TRAIN
    rare = labels.clamp(min=1)
    rare[7] = 0
    with pytest.raises(UsageError, match=r"class 0 has 1 training pictures, fewer than any of shots \[4, 8\]"):
        few_shot(features, rare, *TEST, classes=5, shots=(8, 4))
    with pytest.raises(UsageError, match=r"no training picture \(class 4\)"):
        few_shot(features, labels.clamp(max=3), *TEST, classes=5)
    with pytest.raises(UsageError, match="both are 1 or more"):
        few_shot(*TRAIN, *TEST, classes=5, shots=(0, 1))
    with pytest.raises(UsageError, match="not finite"):
        few_shot(features * torch.tensor(float("nan")), labels, *TEST, classes=5)
    with pytest.raises(UsageError, match="not a strength"):
        FewShotConfig(l2=-1.0)


def test_data_efficiency_is_read_off_the_curve():
    curve = {1: 0.2, 2: 0.4, 4: 0.5, 8: 0.5, 16: 0.7}
    assert data_efficiency(0.4, curve) == pytest.approx(2)
    assert data_efficiency(0.45, curve) == pytest.approx(2**1.5)
    assert data_efficiency(0.6, curve) == pytest.approx(8 * 2**0.5)
    assert data_efficiency(0.1, curve) == pytest.approx(2**-0.5)  # half a doubling below one picture
    assert data_efficiency(0.75, curve) is None
    assert data_efficiency(0.75, curve, full=(1024.0, 0.8)) == pytest.approx(16 * 8)
    assert data_efficiency(0.9, curve, full=(1024.0, 0.8)) is None
    assert data_efficiency(0.3, {1: 0.5, 2: 0.4, 4: 0.6}) == 1  # a curve that falls at first
    with pytest.raises(UsageError, match="1 points"):
        data_efficiency(0.5, {1: 0.4})
