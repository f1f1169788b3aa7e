import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from diptych.evaluate.metrics import measures


@pytest.mark.parametrize("top", [1, 3, 5])
def test_accuracy_equals_scikit_learns(top):
    torch.manual_seed(0)
    scores, labels = torch.randn(500, 20), torch.randint(0, 20, (500,))
    expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=top)
    assert measures.accuracy(scores, labels, top) == pytest.approx(expected, abs=1e-9)


def test_a_constant_classifier_is_right_as_often_as_guessing():
    labels = torch.arange(10).repeat(10)
    assert measures.accuracy(torch.zeros(100, 10), labels) == pytest.approx(0.1)
    assert measures.accuracy(torch.zeros(100, 10), labels, top=5) == pytest.approx(0.5)


def test_the_wilson_interval_has_its_published_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert measures.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert measures.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert measures.wilson_interval(0.0, 0) == (0.0, 1.0)


def test_retrieval_equals_a_full_sort(monkeypatch):
    monkeypatch.setattr(measures, "_ROWS", 7)
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    text = torch.nn.functional.normalize(image + 0.8 * torch.randn(50, 8), dim=-1)
    similarity = (image @ text.T).numpy()
    own = np.arange(50)[:, None]
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_retrieval_recall@{k}"] = (np.argsort(-similarity.T, axis=1)[:, :k] == own).any(axis=1).mean()
        expected[f"text_retrieval_recall@{k}"] = (np.argsort(-similarity, axis=1)[:, :k] == own).any(axis=1).mean()
    assert measures.retrieval(image, text) == pytest.approx(expected)


def test_features_that_are_all_equal_retrieve_by_chance():
    same = torch.ones(20, 4) / 2
    assert measures.retrieval(same, same, ks=(1,))["image_retrieval_recall@1"] == pytest.approx(1 / 20)


def test_the_summary_names_chance_and_interval():
    summary = measures.classification(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert summary["acc1"] == 0.75
    assert (summary["chance"], summary["classes"], summary["images"]) == (0.25, 4, 4)
    assert summary["ci95"][0] < 0.75 < summary["ci95"][1]
