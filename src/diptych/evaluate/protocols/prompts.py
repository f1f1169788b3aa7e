"""Protocol `prompts`: the bare name, one sentence, the ensemble, and the paper's forward selection among templates.

All of it is arithmetic on one table, the embedding of every class in every template: an ensemble is the normalised mean
of some of its rows (section 3.1.4), so that no text is embedded twice.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.evaluate.metrics import measures
from diptych.evaluate.metrics.measures import METRICS, Metric
from diptych.evaluate.protocols.task import Arrays, ProtocolSpec, Task
from diptych.evaluate.results import Result
from diptych.templates import fill_template
from diptych.zeroshot import Classnames, EmbedTexts, names_of_classes

BARE, SIMPLE = "{}", "a photo of a {}."
KEPT = 1 << 28
"""Products of pictures and classes, over all templates, that are kept in memory (floats)."""
SEARCH_PICTURES = 10_000
"""Pictures that templates are chosen on, at most."""


def prompts(task: Task) -> tuple[Result, Arrays]:
    """The bare name, a sentence, the ensemble, and a forward selection among the ensemble's templates (chosen on the
    training pictures if there are any)."""
    numbered, kind = task.test.numbered, task.used.dataset.kind
    templates = list(dict.fromkeys((BARE, SIMPLE, *numbered.templates)))
    table = embed_templates(task.embed_texts, numbered.names, templates)
    labels, features = task.test.labels(kind), task.test.embedded.joint

    def value(chosen: Sequence[str], features: Tensor = features, labels: Tensor = labels) -> float:
        rows = table[[templates.index(template) for template in chosen]]
        return METRICS[task.used.metric](_ranked(task, features @ join_templates(rows)), labels)

    found = {"bare": value([BARE]), "simple": value([SIMPLE]), "ensemble": value(numbered.templates)}
    warnings = []
    on = task.splits.get("train")
    if on is None:
        on = task.test
        warnings.append("templates were chosen on the pictures that they are measured on: there is no train split")
    some = torch.randperm(len(on.embedded.kept), generator=torch.Generator().manual_seed(task.config.seed))
    some = some[:SEARCH_PICTURES].sort().values
    candidates = table[[templates.index(template) for template in numbered.templates]]
    steps = search_templates(
        on.embedded.joint[some],
        on.labels(kind)[some],
        candidates,
        lambda scores, labels: METRICS[task.used.metric](_ranked(task, scores), labels),
    )
    chosen = [numbered.templates[number] for number, _ in steps]
    search = [[template, value(chosen[: i + 1])] for i, template in enumerate(chosen)]
    best = value(chosen)
    details = {**found, "search": search, "search_pictures": len(some), "search_values": [v for _, v in steps]}
    result = task.result(
        "prompts",
        task.used.metric,
        best,
        metrics={**found, "search": best, task.used.metric: best},
        chance=measures.chance(task.used.metric, len(numbered.names), labels),
        warnings=warnings,
        details=details,
    )
    return result, {}


def _ranked(task: Task, cosines: Tensor) -> Tensor:
    """Scores as the metric wants them."""
    return (task.scale * cosines).double().softmax(dim=1) if task.used.metric == "map_11_point" else cosines


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


SPEC = ProtocolSpec(kinds=("single", "multi"), splits=("test", "train"), measure=prompts)
