"""A results folder as figures and reports see it: models, results by place, and published numbers beside them."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.metrics.measures import accuracy
from diptych.evaluate.metrics.robustness import (
    IMAGENET,
    TableRow,
    select_classes,
)
from diptych.evaluate.references import (
    PAPER27,
    SHIFTS,
    Compared,
    Reference,
    check_name,
    compare,
    published_name,
    reference,
)
from diptych.evaluate.results import ModelFacts, Protocol, Result, iter_results, load_models

PROTOCOL_OF_SHIFT: dict[str, Protocol] = {
    shift: "temporal" if shift in ("imagenet_vid_robust", "ytbb_robust") else "zeroshot" for shift in SHIFTS
}
"""How a shift is measured without training."""

OF_PAPER = frozenset({*PAPER27, *SHIFTS, IMAGENET, "flickr30k", "mscoco"})
"""Datasets that the paper's figures and tables are of."""
GFLOPS = "GFLOPs of the image tower a picture (a multiply-add counted as two)"
"""Label of the horizontal axis of figures over size."""
RESNET50 = ("resnet50", "rn50")
"""How names of baselines begin that can stand for the paper's ResNet-50."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that was measured."""

    models: Mapping[str, ModelFacts]
    results: Mapping[tuple[str, str, str], Result]
    """By model, dataset and protocol."""
    names: Mapping[str, str]
    """Model -> the name under which numbers of it are published, of those that have one."""
    shown: str
    """The model that figures of one model show."""
    table: tuple[TableRow, ...] = ()
    """ImageNet models, from the user."""
    on_subset: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(model, shift) -> accuracy on ImageNet among the classes of the shift."""

    @property
    def is_own(self) -> bool:
        """Whether none of the paper's datasets is here."""
        return not OF_PAPER & {dataset for _, dataset, _ in self.results}

    def get(self, model: str, dataset: str, protocol: Protocol) -> Result | None:
        """One result, if it is there."""
        return self.results.get((model, dataset, protocol))

    def value(self, model: str, dataset: str, protocol: Protocol) -> float | None:
        """Its headline number."""
        found = self.get(model, dataset, protocol)
        return None if found is None else found.value

    def datasets(self, protocol: Protocol, model: str | None = None) -> tuple[str, ...]:
        """Datasets that have this protocol, of one model or any, in order; ImageNet's shifts are not among them."""
        return tuple(
            dict.fromkeys(
                d for m, d, p in sorted(self.results) if p == protocol and model in (None, m) and d not in SHIFTS
            )
        )

    def having(self, protocol: Protocol, *, baselines: bool | None = None) -> tuple[str, ...]:
        """Models with at least one result of this protocol, by name."""
        return tuple(
            name
            for name, facts in self.models.items()
            if baselines in (None, facts.baseline) and self.datasets(protocol, name)
        )

    @property
    def resnet50(self) -> str | None:
        """The ResNet-50 among the baselines that have probes, by what it was loaded from, or by its name."""
        for name in self.having("probe", baselines=True):
            for said in (self.models[name].source.removeprefix("timm:"), self.models[name].name):
                if said.lower().replace("-", "").replace("_", "").startswith(RESNET50):
                    return name
        return None

    def shared(self, protocol: Protocol, models: Sequence[str], among: Sequence[str] | None = None) -> tuple[str, ...]:
        """Datasets on which all these models have this protocol."""
        found = [d for d in self.datasets(protocol) if all((m, d, protocol) in self.results for m in models)]
        return tuple(found if among is None else [d for d in among if d in found])

    def published(self, result: Result) -> Compared | None:
        """The published number beside a result."""
        return compare(result, self.names.get(result.model))

    def paper(self, model: str, dataset: str, protocol: Protocol) -> Reference | None:
        """The paper's value for a result, if it was measured in the paper's way."""
        found = self.results.get((model, dataset, protocol))
        if found is None or found.profile != "paper" or model not in self.names:
            return None
        printed = reference(dataset, self.names[model], protocol, metric=found.metric, profile="paper")
        return printed[0] if printed else None

    def by_size(self, models: Sequence[str]) -> list[str]:
        """Models, the smallest first."""
        return sorted(models, key=lambda model: (self.models[model].gflops or 0.0, model))

    def imagenet(self, model: str, shift: str) -> float | None:
        """Zero-shot accuracy on ImageNet, on the classes of the shift where that is known."""
        return self.on_subset.get((model, shift), self.value(model, IMAGENET, "zeroshot"))


def load_study(
    folder: Path,
    *,
    names: Mapping[str, str] | None = None,
    shown: str | None = None,
    table: Sequence[TableRow] = (),
    subsets: Mapping[str, Sequence[int]] | None = None,
) -> Study:
    """Read a results folder.

    `names`: model -> published name, for models whose source does not say it. `shown`: the model of figures that show
    one; by default the CLIP with the most results, of equals the largest. `subsets`: shift -> the classes of ImageNet
    that it covers, on which ImageNet's accuracy is then computed from the saved scores.
    """
    models = load_models(folder)
    results = {(r.model, r.dataset, r.protocol): r for r in iter_results(folder)}
    if not results:
        raise UsageError(f"{folder} holds no results; `diptych evaluate --out {folder}` makes some")
    if unknown := sorted({model for model, *_ in results} - models.keys()):
        raise UsageError(f"{folder}/{unknown[0]} has results but no model.json; evaluate that model again")
    given = {name: check_name(published) for name, published in (names or {}).items()}
    for name in (*given, *((shown,) if shown else ())):
        if name not in models:
            raise NotFoundError(f"no model {name!r} in {folder}; there are {', '.join(models)}")
    known = {name: published for name, facts in models.items() if (published := published_name(facts))}
    return Study(
        models=models,
        results=results,
        names=known | given,
        shown=shown or _most_measured(models, results),
        table=tuple(table),
        on_subset=_measure_subsets(folder, models, subsets or {}),
    )


def _most_measured(models: Mapping[str, ModelFacts], results: Mapping[tuple[str, str, str], Result]) -> str:
    def rank(name: str) -> tuple[bool, int, float]:
        return not models[name].baseline, sum(m == name for m, *_ in results), models[name].gflops or 0.0

    return max(sorted({model for model, *_ in results}), key=rank)


def _measure_subsets(
    folder: Path, models: Mapping[str, ModelFacts], subsets: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], float]:
    """Accuracy on the part of ImageNet that a shift covers, of every model whose scores on ImageNet were saved."""
    found: dict[tuple[str, str], float] = {}
    wanted = {shift: classes for shift, classes in subsets.items() if shift in SHIFTS}
    for name in models if wanted else ():
        path = folder / name / IMAGENET / "zeroshot.npz"
        if not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                scores, labels = torch.from_numpy(arrays["scores"]), torch.from_numpy(arrays["labels"]).long()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} cannot be read ({error}); delete it and evaluate again") from None
        for shift, classes in wanted.items():
            chosen, numbers = select_classes(scores, labels, classes)
            if len(numbers):
                found[name, shift] = accuracy(chosen, numbers)
    return found
