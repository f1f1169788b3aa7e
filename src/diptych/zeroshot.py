"""Zero-shot prediction: class names in, labels out (paper section 3.1).

Every class name is put into every template; the text features are normalised, averaged and normalised again, and are
then the columns of a linear classifier (section 3.1.4). A class may have several names; all of them are averaged.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diptych.checkpoint.loaded import Loaded
from diptych.embed.images import ImageTower, embed_images, encode_each, remember_names, require_finite
from diptych.embed.texts import BATCH_SIZE, embed_texts
from diptych.errors import PictureError, UsageError
from diptych.image import Picture
from diptych.model.config import Precision
from diptych.templates import fill_template, parse_templates
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


class ZeroShotClassifier:
    """A classifier made of words, with scikit-learn's manners.

    >>> classifier = ZeroShotClassifier(load("runs/demo"), ["cat", "dog"])      # doctest: +SKIP
    >>> classifier.predict(["a.jpg", "b.png"])                                  # doctest: +SKIP
    array(['cat', 'dog'], dtype='<U3')

    Words and pictures are embedded in `precision`; "auto" is several times as fast where bfloat16 is.
    `classnames` may give several names for a class: [["happy", "smiling"], "sad"]; the first is its label.
    """

    def __init__(
        self,
        loaded: Loaded,
        classnames: Classnames,
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        precision: Precision = "exact",
    ) -> None:
        self.loaded = loaded
        self.classnames = names_of_classes(classnames)
        self.templates = parse_templates([templates] if isinstance(templates, str) else templates)
        labels = [names[0] for names in self.classnames]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise UsageError(f"class {repeated[0]!r} is named twice; give several names of a class as one list")
        _require_distinct(loaded.tokenizer, self.classnames, self.templates[0])
        self.classes_ = np.array(labels)
        self.precision: Precision = precision
        embed = partial(embed_texts, loaded, precision=precision)
        self.weights_ = build_classifier(embed, self.classnames, self.templates)  # [E, C]

    def decision_function(self, pictures: Iterable[Picture]) -> NDArray[np.float32]:
        """Logits [N, C]: exp(t) times the cosine similarity of picture and class."""
        return self._logits(embed_images(self.loaded, pictures, precision=self.precision)).numpy()

    def predict(self, pictures: Iterable[Picture]) -> NDArray[Any]:
        """The likeliest label of each picture [N]."""
        return self.classes_[self.predict_proba(pictures).argmax(axis=-1)]

    def predict_proba(self, pictures: Iterable[Picture]) -> NDArray[np.float32]:
        """Softmax of the logits over the classes [N, C]; raises PictureError, which names it, for a picture that cannot
        be used (`predict_each` goes on with the others)."""
        rows, names = [], list[str]()
        for row in self.predict_each(remember_names(pictures, names)):
            if isinstance(row, PictureError):
                raise row.of(names[len(rows)])
            rows.append(row)
        return np.stack(rows) if rows else np.empty((0, len(self.classes_)), np.float32)

    def predict_each(self, pictures: Iterable[Picture]) -> Iterator[NDArray[np.float32] | PictureError]:
        """`predict_proba` of any number of pictures one after the other [C], or why one cannot be used."""
        with closing(encode_each(ImageTower(self.loaded, self.precision), pictures)) as features:
            for feature in features:
                usable = not isinstance(feature, PictureError)
                yield self._logits(require_finite(feature)).softmax(dim=-1).numpy() if usable else feature

    def _logits(self, features: Float[Tensor, "*N E"]) -> Float[Tensor, "*N C"]:
        return self.loaded.model.logit_scale.detach().exp().cpu() * features @ self.weights_
