import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from diptych import zeroshot
from diptych.checkpoint.loaded import Loaded
from diptych.embed.images import embed_images
from diptych.embed.texts import embed_texts
from diptych.errors import PictureError, UsageError
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.templates import load_templates, parse_templates
from diptych.tokenizer import Tokenizer
from diptych.zeroshot import PictureFeatures, ZeroShotClassifier, build_classifier
from reference import texts as slow
from samples import TINY_VIT, draw, noise


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(0)
    return Loaded(CLIP(TINY_VIT).eval(), Preprocess(image_size=32), Tokenizer.clip(16))


def test_template_lists_are_the_published_ones():
    assert len(set(load_templates("imagenet_80"))) == 80
    assert set(load_templates("imagenet_7")) < set(load_templates("imagenet_80"))
    assert len(load_templates("imagenet_7")) == 7
    with pytest.raises(UsageError, match="did you mean imagenet_80"):
        load_templates("imagenet80")


def test_lists_by_name_and_templates_are_put_together():
    assert parse_templates(["simple", "a drawing of {}."]) == (*load_templates("simple"), "a drawing of {}.")
    for given, message in (([], "no template was named"), (["{} and {}"], "exactly one {}"), (["a"], "has one {}")):
        with pytest.raises(UsageError, match=message):
            parse_templates(given)


def test_the_classifier_is_normalise_average_normalise(loaded):
    templates, names = ["a {}.", "the {} here", "{}"], ["cat", ["dog", "hound"]]
    weights = build_classifier(partial(embed_texts, loaded), names, templates)
    for column, aliases in zip(weights.T, (["cat"], ["dog", "hound"]), strict=True):
        features = torch.cat(
            [
                loaded.model.encode_text(loaded.tokenizer([template.replace("{}", name)]))
                for name in aliases
                for template in templates
            ]
        )
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)
        torch.testing.assert_close(column, (mean / mean.norm()).detach(), rtol=1e-5, atol=1e-6)


def test_the_classifier_has_scikit_learns_manners(loaded):
    classifier = ZeroShotClassifier(loaded, ["red", ["blue", "azure"], "green"])
    pictures = [draw("red", "dot"), draw("blue", "ring"), np.asarray(draw("green", "bar"))]
    assert classifier.classes_.tolist() == ["red", "blue", "green"]
    probabilities = classifier.predict_proba(pictures)
    assert probabilities.shape == (3, 3)
    assert classifier.predict([]).shape == (0,)
    with pytest.raises(PictureError, match="not_a_picture"):
        classifier.predict([pictures[0], b"not a picture"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert classifier.predict(pictures).tolist() == classifier.classes_[probabilities.argmax(axis=1)].tolist()
    weights = build_classifier(partial(embed_texts, loaded), ["red", ["blue", "azure"], "green"])
    expected = embed_images(loaded, pictures) @ weights
    scale = loaded.model.logit_scale.exp().item()
    np.testing.assert_allclose(classifier.decision_function(pictures), scale * expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "at least one class"),
        (["a", []], ["{}"], "a name for every class"),
        (["a"], [], "no template was named"),
        (["a"], ["a photo"], "has one {}"),
        (["a", "b", "a"], ["{}"], "'a' is named twice"),
    ],
)
def test_classifiers_that_make_no_sense_are_refused(loaded, names, templates, message):
    with pytest.raises(UsageError, match=message):
        ZeroShotClassifier(loaded, names, templates)


def test_embedding_keeps_the_order_whatever_the_batches(loaded):
    pictures = [noise(seed=seed) for seed in range(7)]
    torch.testing.assert_close(
        embed_images(loaded, pictures, 2), embed_images(loaded, pictures, 7), rtol=1e-4, atol=1e-5
    )
    assert embed_images(loaded, []).shape == (0, 24)


def test_texts_keep_their_order_whatever_the_batches_and_are_exact_on_request(loaded):
    texts = ["a", "a much longer text about cats and dogs", "b c", "", "a much longer text", "d", "b c"]
    expected = torch.nn.functional.normalize(slow.encode(loaded.model.text, loaded.tokenizer(texts)), dim=-1)
    for batch_size in (1, 2, 5, 100):
        features = embed_texts(loaded, texts, batch_size, precision="exact")
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
        rounded = embed_texts(loaded, texts, batch_size, precision="bfloat16")
        assert torch.nn.functional.cosine_similarity(rounded, expected).min() > 0.999  # a tiny tower
        assert not torch.equal(rounded, features)
    assert embed_texts(loaded, []).shape == (0, 24)


def test_a_classifier_is_the_same_however_few_prompts_are_held(loaded, monkeypatch):
    names, templates = ["cat", ["dog", "hound", "puppy"], "great grey owl", ["ox", "bull"]], ["a {}.", "the {}", "{}"]
    whole, held = build_classifier(partial(embed_texts, loaded), names, templates), []
    monkeypatch.setattr(zeroshot, "BATCH_SIZE", 9)

    def embed(texts: Sequence[str]) -> torch.Tensor:
        held.append(len(texts))
        return embed_texts(loaded, texts)

    torch.testing.assert_close(build_classifier(embed, names, templates), whole)
    assert held == [3, 9, 9]
    rounded = build_classifier(partial(embed_texts, loaded, precision="bfloat16"), names, templates)
    assert torch.nn.functional.cosine_similarity(rounded, whole, dim=0).min() > 0.999


def test_each_precision_has_its_classifier(loaded):
    exact = ZeroShotClassifier(loaded, ["one", "two"], precision="exact").weights_
    assert not torch.equal(exact, ZeroShotClassifier(loaded, ["one", "two"], precision="bfloat16").weights_)
    assert torch.equal(exact, ZeroShotClassifier(loaded, ["one", "two"], precision="exact").weights_)


@pytest.mark.parametrize("names", [[""], ["cat", " "], [["dog", ""], "cat"]])
def test_a_class_without_a_name_is_refused(names):
    with pytest.raises(UsageError, match="has an empty name"):
        zeroshot.names_of_classes(names)


# --- scikit-learn's manners ---


@pytest.fixture(scope="module")
def shapes() -> tuple[list, list[str]]:
    return [draw(colour, shape) for colour in ("red", "blue", "green") for shape in ("dot", "ring")], [
        "dot",
        "ring",
    ] * 3


def test_scikit_learn_takes_the_classifier_for_one(loaded, shapes):
    pictures, labels = shapes
    classifier = ZeroShotClassifier(loaded, ["dot", ["ring", "circle"]], "a {}.", precision="float32")
    assert is_classifier(classifier)
    again = clone(classifier)
    assert again is not classifier
    assert again.loaded is loaded, "weights are not copied"
    assert again.fit(pictures, labels) is again
    np.testing.assert_array_equal(again.predict_proba(pictures), classifier.predict_proba(pictures))
    right = classifier.predict(pictures) == np.array(labels)
    assert classifier.score(pictures, labels) == right.mean()
    assert classifier.score(pictures, labels, sample_weight=[1, 0, 0, 0, 0, 0]) == right[0]
    assert make_pipeline(classifier).fit(pictures, labels).score(pictures, labels) == right.mean()
    scores = cross_val_score(classifier, pictures, labels, cv=3)
    assert scores.tolist() == pytest.approx(right.reshape(3, 2).mean(axis=1).tolist())
    with pytest.raises(UsageError, match="label 'cube' is no class of this classifier; it has dot, ring"):
        classifier.fit(pictures, ["dot", "cube"])


def test_parameters_can_be_read_set_and_searched_over(loaded, shapes):
    classifier = ZeroShotClassifier(loaded, ["dot", "ring"])
    before, other = classifier.weights_, clone(classifier)
    assert set(classifier.get_params()) == {"loaded", "classnames", "templates", "precision"}
    other.set_params(templates=["{}"], classnames=["cat", "dog", "cow"])
    assert (other.classes_.tolist(), other.templates) == (["cat", "dog", "cow"], ("{}",))
    assert torch.equal(classifier.weights_, before)
    assert other.weights_.shape[1] == 3
    with pytest.raises(UsageError, match="unknown parameter 'template'; did you mean templates"):
        other.set_params(template=["{}"])
    found = GridSearchCV(classifier, {"templates": [["{}"], ["a photo of a {}."]]}, cv=3).fit(*shapes)
    assert found.best_params_["templates"] in (["{}"], ["a photo of a {}."])


def test_features_of_pictures_are_the_first_step_of_a_pipeline(loaded, shapes):
    pictures, labels = shapes
    steps = make_pipeline(PictureFeatures(loaded), LogisticRegression(C=1e4))
    assert cross_val_score(steps, pictures, labels, cv=3).shape == (3,)
    assert steps.fit(pictures, labels).score(pictures, labels) == 1.0
    np.testing.assert_array_equal(clone(steps[0]).transform(pictures), embed_images(loaded, pictures).numpy())


def test_nothing_of_it_needs_scikit_learn(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    classifier = ZeroShotClassifier(loaded, ["dot", "ring"])
    assert classifier.fit([], None).set_params(templates=["{}"]).score([draw("red", "dot")], ["dot"]) in (0.0, 1.0)
