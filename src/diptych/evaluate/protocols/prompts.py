"""Which templates help: the bare name, one sentence, the ensemble, and the paper's forward selection among them.

All of it is arithmetic on one table, the embedding of every class in every template: an ensemble is the normalised mean
of some of its rows (section 3.1.4), so that no text is embedded twice.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.evaluate.metrics.measures import Metric
from diptych.evaluate.models.features import EmbedTexts
from diptych.zeroshot import Classnames, fill_template, names_of_classes

BARE, SIMPLE = "{}", "a photo of a {}."
CLASSES = 16_384
"""Prompts that are embedded at once."""
KEPT = 1 << 28
"""Products of pictures and classes, over all templates, that are kept in memory (floats)."""


def build_weights(embed: EmbedTexts, classnames: Classnames, templates: Sequence[str]) -> Float[Tensor, "E C"]:
    """What `diptych.zeroshot.build_classifier` builds, of features that `embed` may have kept from before."""
    names = names_of_classes(classnames)
    step = max(1, CLASSES // len(templates))
    means: list[Tensor] = []
    for start in range(0, len(names), step):
        some = names[start : start + step]
        texts = [fill_template(template, name) for entry in some for name in entry for template in templates]
        parts = embed(texts).split([len(entry) * len(templates) for entry in some])
        means += [part.mean(dim=0) for part in parts]
    return F.normalize(torch.stack(means), dim=-1).T.contiguous()


def embed_templates(embed: EmbedTexts, classnames: Classnames, templates: Sequence[str]) -> Float[Tensor, "T C E"]:
    """Every class in every template: the mean over the class's names."""
    names = names_of_classes(classnames)
    sizes = [len(entry) for entry in names]
    flat = [name for entry in names for name in entry]
    rows = []
    for template in templates:
        features = embed([fill_template(template, name) for name in flat])
        rows.append(torch.stack([part.mean(dim=0) for part in features.split(sizes)]))
    return torch.stack(rows)


def join_templates(table: Float[Tensor, "T C E"]) -> Float[Tensor, "E C"]:
    """The classifier of an ensemble, as `build_classifier` makes it of names and templates."""
    return F.normalize(table.mean(dim=0), dim=-1).T.contiguous()


def search_templates(
    features: Float[Tensor, "N E"], labels: Tensor, table: Float[Tensor, "T C E"], metric: Metric
) -> list[tuple[int, float]]:
    """Forward selection: the template that helps the ensemble most comes in, until none helps. Template and value with
    it, in order; of equal ones the first of the list."""
    count = len(table)
    keep = count * len(features) * table.shape[1] <= KEPT
    products = [features @ classes.T for classes in table] if keep else None
    chosen: list[tuple[int, float]] = []
    total = torch.zeros_like(table[0])
    of_total = torch.zeros(len(features), table.shape[1]) if keep else None
    best = -1.0
    while len(chosen) < count:
        left = [t for t in range(count) if t not in {number for number, _ in chosen}]
        values = []
        for t in left:
            length = (total + table[t]).norm(dim=-1).clamp(min=1e-12)
            if products is not None and of_total is not None:
                scores = (of_total + products[t]) / length
            else:
                scores = features @ ((total + table[t]) / length[:, None]).T
            values.append(metric(scores, labels))
        value = max(values)
        if value <= best:
            break
        number, best = left[values.index(value)], value
        chosen.append((number, value))
        total = total + table[number]
        if products is not None and of_total is not None:
            of_total = of_total + products[number]
    return chosen
