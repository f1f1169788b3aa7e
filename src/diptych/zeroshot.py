"""Zero-shot prediction: class names in, labels out (paper section 3.1).

Every class name is put into every template; the text features are normalised, averaged and normalised again, and are
then the columns of a linear classifier (section 3.1.4). A class may have several names; all of them are averaged.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.loaded import Loaded
from diptych.embed.images import ImageTower, embed_images, encode_each, remember_names, require_finite
from diptych.embed.texts import BATCH_SIZE, embed_texts
from diptych.errors import PictureError, UsageError, unknown_name
from diptych.image import Picture
from diptych.model.config import CLIPConfig, Precision
from diptych.templates import SIMPLE, fill_template, parse_templates
from diptych.tokens import BaseTokenizer

Classnames = Sequence[str | Sequence[str]]
"""One entry a class: its name, or several names for it."""
EmbedTexts = Callable[[Sequence[str]], Float[Tensor, "N E"]]
"""Texts to their features, normalised: `partial(embed_texts, loaded)`, or a cache in front of it."""


def names_of_classes(classnames: Classnames) -> tuple[tuple[str, ...], ...]:
    """Every class as a tuple of its names."""
    if isinstance(classnames, str | Mapping):
        raise UsageError(
            f"classnames are a list with an entry for each class (its name, or a list of names), not {classnames!r}"
        )
    names = tuple((entry,) if isinstance(entry, str) else tuple(entry) for entry in classnames)
    if not names or not all(names):
        raise UsageError("a classifier needs at least one class, and a name for every class")
    for entry in names:
        if not all(name.strip() for name in entry):
            given = "|".join(entry)
            raise UsageError(f"class {given!r} has an empty name; a name is text, so write one or drop it")
    return names


def suitable_templates(config: CLIPConfig) -> tuple[str, ...]:
    """The templates that a model was trained for, if its checkpoint says so; else a photo of a {}."""
    return config.templates or SIMPLE


def build_classifier(
    embed: EmbedTexts, classnames: Classnames, templates: Sequence[str] = ("a photo of a {}.",)
) -> Float[Tensor, "E C"]:
    """Build the weights of a zero-shot classifier: logits are exp(t) * image_features @ weights.

    However many classes there are, the prompts of a few at a time are held.
    """
    names = names_of_classes(classnames)
    if not templates:
        raise UsageError("a classifier needs at least one template; {} is the bare name")
    means: list[Tensor] = []
    for some in _split_classes(names, max(1, BATCH_SIZE // len(templates))):
        prompts = [fill_template(template, name) for entry in some for name in entry for template in templates]
        of_classes = embed(prompts).split([len(entry) * len(templates) for entry in some])
        means += [features.mean(dim=0) for features in of_classes]
    return F.normalize(torch.stack(means), dim=-1).T.contiguous()


def _split_classes(names: Sequence[tuple[str, ...]], most: int) -> Iterator[list[tuple[str, ...]]]:
    """Classes in a row that have `most` names together, or one class."""
    some, count = [], 0
    for entry in names:
        if some and count + len(entry) > most:
            yield some
            some, count = [], 0
        some.append(entry)
        count += len(entry)
    yield some


def _require_distinct(tokenizer: BaseTokenizer, classnames: Sequence[tuple[str, ...]], template: str) -> None:
    """Refuse two classes that are the same tokens; warn of names that are longer than the model reads."""
    prompts = [fill_template(template, name) for entry in classnames for name in entry]
    batch = tokenizer.encode_batch(prompts)
    if batch.truncated:
        warnings.warn(
            f"{batch.truncated} of {len(prompts)} names are longer than the model's {tokenizer.context_length} tokens "
            "and are cut",
            stacklevel=3,
        )
    rows = iter(np.split(batch.ids, batch.offsets[1:-1]))
    seen: dict[frozenset[bytes], str] = {}
    for entry in classnames:
        tokens = frozenset(next(rows).tobytes() for _ in entry)
        if tokens in seen:
            raise UsageError(
                f"classes {seen[tokens]!r} and {entry[0]!r} are the same to the model, which reads lower case and "
                f"{tokenizer.context_length} tokens: one of them is named twice, or differs too late"
            )
        seen[tokens] = entry[0]


class Scores(NamedTuple):
    """What a classifier says of a picture [C], or of several [N, C]."""

    probability: NDArray[np.float32]
    """Softmax over the classes: shares of 1, which one class takes from the others."""
    cosine: NDArray[np.float32]
    """Similarity of picture and class, each for itself; what is high depends on the model."""
    sigmoid: NDArray[np.float32] | None
    """Probability that picture and class are a pair, each for itself; None where the model was not trained for it (its
    logits have no bias)."""


class _Estimator:
    """What scikit-learn asks of whatever stands in a pipeline or is cross-validated; nothing is learnt, so a clone has
    the same weights, not a copy of them. scikit-learn itself is not needed."""

    _given: dict[str, Any]
    """Arguments of the constructor."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002 - scikit-learn's
        """Arguments that it was made with; none is an estimator, so `deep` changes nothing."""
        return dict(self._given)

    def set_params(self, **params: Any) -> Any:
        """Make it anew with other arguments; UsageError for one that it does not have."""
        for name in params.keys() - self._given.keys():
            raise unknown_name("parameter", name, self._given)
        if params:
            type(self).__init__(self, **{**self._given, **params})
        return self

    def __sklearn_clone__(self) -> Any:
        return copy.copy(self)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags, TransformerTags

        classifies = hasattr(self, "predict")
        return Tags(
            estimator_type="classifier" if classifies else None,
            target_tags=TargetTags(required=False),
            classifier_tags=ClassifierTags() if classifies else None,
            transformer_tags=None if classifies else TransformerTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
            requires_fit=False,
        )


class PictureFeatures(_Estimator):
    """Pictures to their features, normalised, as the first step of a scikit-learn pipeline.

    >>> make_pipeline(PictureFeatures(load("runs/demo")), LogisticRegression())     # doctest: +SKIP
    """

    def __init__(self, loaded: Loaded, *, precision: Precision = "exact") -> None:
        self._given = {"loaded": loaded, "precision": precision}
        self.loaded = loaded
        self.precision: Precision = precision

    def fit(self, pictures: Iterable[Picture], y: object = None) -> "PictureFeatures":  # noqa: ARG002 - scikit-learn's
        """Nothing: there is nothing to learn."""
        return self

    def transform(self, pictures: Iterable[Picture]) -> Float[np.ndarray, "N E"]:
        """float32 features; raises PictureError as `embed_images` does."""
        return embed_images(self.loaded, pictures, precision=self.precision).numpy()


class ZeroShotClassifier(_Estimator):
    """A classifier made of words, with scikit-learn's manners: it can be cloned, cross-validated, searched over.

    >>> classifier = ZeroShotClassifier(load("runs/demo"), ["cat", "dog"])      # doctest: +SKIP
    >>> classifier.predict(["a.jpg", "b.png"])                                  # doctest: +SKIP
    array(['cat', 'dog'], dtype='<U3')

    Words and pictures are embedded in `precision`; "auto" is several times as fast where bfloat16 is.
    `classnames` may give several names for a class: [["happy", "smiling"], "sad"]; the first is its label.
    `templates` are those that the checkpoint names, else "a photo of a {}.".
    """

    def __init__(
        self,
        loaded: Loaded,
        classnames: Classnames,
        templates: Sequence[str] | None = None,
        *,
        precision: Precision = "exact",
    ) -> None:
        self._given = {"loaded": loaded, "classnames": classnames, "templates": templates, "precision": precision}
        self.loaded = loaded
        self.classnames = names_of_classes(classnames)
        given = [templates] if isinstance(templates, str) else templates
        self.templates = suitable_templates(loaded.model.config) if given is None else parse_templates(given)
        labels = [names[0] for names in self.classnames]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise UsageError(f"class {repeated[0]!r} is named twice; give several names of a class as one list")
        _require_distinct(loaded.tokenizer, self.classnames, self.templates[0])
        self.classes_ = np.array(labels)
        self.precision: Precision = precision
        embed = partial(embed_texts, loaded, precision=precision)
        self.weights_ = build_classifier(embed, self.classnames, self.templates)  # [E, C]

    def fit(
        self,
        pictures: Iterable[Picture],  # noqa: ARG002 - scikit-learn's
        y: Sequence[Any] | NDArray[Any] | None = None,
    ) -> "ZeroShotClassifier":
        """Nothing is learnt; raises UsageError for a label in `y` that is none of the classes."""
        unknown = [] if y is None else sorted({str(label) for label in y} - set(self.classes_.tolist()))
        if unknown:
            raise UsageError(
                f"label {unknown[0]!r} is no class of this classifier; it has {', '.join(self.classes_[:9])}"
            )
        return self

    def score(
        self, pictures: Iterable[Picture], y: Sequence[Any] | NDArray[Any], sample_weight: ArrayLike | None = None
    ) -> float:
        """Accuracy: the share of pictures whose likeliest label is theirs."""
        weights = None if sample_weight is None else np.asarray(sample_weight)
        return float(np.average(self.predict(pictures) == np.asarray(y), weights=weights))

    def decision_function(self, pictures: Iterable[Picture]) -> NDArray[np.float32]:
        """Logits [N, C]: exp(t) times the cosine similarity of picture and class."""
        return self._logits(embed_images(self.loaded, pictures, precision=self.precision)).numpy()

    def predict(self, pictures: Iterable[Picture]) -> NDArray[Any]:
        """The likeliest label of each picture [N]."""
        return self.classes_[self.predict_proba(pictures).argmax(axis=-1)]

    def predict_proba(self, pictures: Iterable[Picture]) -> NDArray[np.float32]:
        """Softmax of the logits over the classes [N, C]; raises PictureError, which names it, for a picture that cannot
        be used (`predict_each` goes on with the others)."""
        return self.predict_scores(pictures).probability

    def predict_scores(self, pictures: Iterable[Picture]) -> Scores:
        """All scores of all pictures [N, C]; raises PictureError as `predict_proba` does."""
        rows, names = list[Scores](), list[str]()
        for row in self.score_each(remember_names(pictures, names)):
            if isinstance(row, PictureError):
                raise row.of(names[len(rows)])
            rows.append(row)
        nothing = np.empty((0, len(self.classes_)), np.float32)
        if not rows:
            return Scores(nothing, nothing, None if self.loaded.model.logit_bias is None else nothing)
        probability, cosine, sigmoid = zip(*rows, strict=True)
        return Scores(np.stack(probability), np.stack(cosine), None if sigmoid[0] is None else np.stack(sigmoid))

    def predict_each(self, pictures: Iterable[Picture]) -> Iterator[NDArray[np.float32] | PictureError]:
        """`predict_proba` of any number of pictures one after the other [C], or why one cannot be used."""
        for scores in self.score_each(pictures):
            yield scores if isinstance(scores, PictureError) else scores.probability

    def score_each(
        self, pictures: Iterable[Any], fetch: Callable[[Any], Picture] | None = None
    ) -> Iterator[Scores | PictureError]:
        """Scores [C] of any number of pictures one after the other, or why one cannot be used. `fetch` brings the
        picture of each item, in the threads that decode."""
        with closing(encode_each(ImageTower(self.loaded, self.precision), pictures, fetch=fetch)) as features:
            for feature in features:
                yield feature if isinstance(feature, PictureError) else self._score(require_finite(feature))

    def _score(self, feature: Float[Tensor, " E"]) -> Scores:
        logits, bias = self._logits(feature), self.loaded.model.logit_bias
        sigmoid = None if bias is None else (logits + bias.detach().cpu()).sigmoid().numpy()
        return Scores(logits.softmax(dim=-1).numpy(), (feature @ self.weights_).numpy(), sigmoid)

    def _logits(self, features: Float[Tensor, "*N E"]) -> Float[Tensor, "*N C"]:
        return self.loaded.model.logit_scale.detach().exp().cpu() * features @ self.weights_
