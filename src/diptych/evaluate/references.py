"""Published numbers: what the paper prints and what OpenCLIP measured, each with its source.

The tables lie in assets/reference/*.csv, under our ids of datasets and models. `confirmed`: read in a public text.
`unconfirmed`: recalled from the paper and not found elsewhere; whoever shows such a number has to say so. caveats.csv
says which rows nobody reproduces with the released weights, and where protocols differ. Nothing here imports torch.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

from diptych.errors import UsageError, unknown_name
from diptych.evaluate.results import ModelFacts, Result

OTHERS = "paper_other.csv"
"""Numbers of the paper about others than its models, and of single tables."""
TABLES = (
    "paper_zero_shot.csv",
    "paper_linear_probe.csv",
    "paper_figure5.csv",
    "paper_robustness.csv",
    "paper_retrieval.csv",
    "paper_bias.csv",
    OTHERS,
    "openclip_38_datasets.csv",
    "openclip_retrieval.csv",
)
PAPER_MODELS = (
    "RN50/openai",
    "RN101/openai",
    "RN50x4/openai",
    "RN50x16/openai",
    "RN50x64/openai",
    "ViT-B-32/openai",
    "ViT-B-16/openai",
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
)
KORNBLITH12 = (
    "food101",
    "cifar10",
    "cifar100",
    "birdsnap",
    "sun397",
    "stanford_cars",
    "fgvc_aircraft",
    "voc2007",
    "dtd",
    "oxford_pets",
    "caltech101",
    "flowers102",
)
PAPER27 = (
    *KORNBLITH12,
    "mnist",
    "fer2013",
    "stl10",
    "eurosat",
    "resisc45",
    "gtsrb",
    "kitti_distance",
    "country211",
    "pcam",
    "ucf101",
    "kinetics700",
    "clevr_counts",
    "hateful_memes",
    "rendered_sst2",
    "imagenet",
)
SHIFTS = (
    "imagenet_v2",
    "imagenet_sketch",
    "imagenet_r",
    "imagenet_a",
    "objectnet",
    "imagenet_vid_robust",
    "ytbb_robust",
)
_COLUMNS = {"dataset", "model", "protocol", "profile", "metric", "percent", "provenance", "source"}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One published number."""

    dataset: str
    model: str
    """ARCHITECTURE/weights as in assets/published.json, or the name of another model."""
    protocol: str
    """As in results; also supervised, finetuned and differences such as probe_minus_zeroshot."""
    profile: str
    """Whose prompts, splits and metric: paper or clip_benchmark."""
    metric: str
    value: float
    """0..1; a difference may be negative."""
    confirmed: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """Why a published number should not be expected."""

    dataset: str
    model: str
    """`*`: any; `*/openai`: the released weights."""
    protocol: str
    """`*`: any."""
    kind: Literal["nobody", "protocol", "degenerate"]
    """nobody: the released weights do not reach it for anyone. protocol: numbers under this name were made in
    different ways. degenerate: the published number looks broken."""
    text: str
    source: str


@cache
def load_references(table: str = "") -> tuple[Reference, ...]:
    """Published numbers of one table, or of all, table by table."""
    return tuple(reference for name in ([table] if table else TABLES) for reference in _read_table(name))


@cache
def load_caveats() -> tuple[Caveat, ...]:
    """All reasons to doubt a published number."""
    with _open("caveats.csv") as lines:
        return tuple(Caveat(**cast(Any, row)) for row in csv.DictReader(lines))


def reference(
    dataset: str, model: str, protocol: str, *, metric: str | None = None, profile: str | None = None
) -> list[Reference]:
    """Published values of a model on a dataset: a number for each metric and profile, often none."""
    return [
        found
        for found in _by_case().get((dataset, model, protocol), ())
        if metric in (None, found.metric) and profile in (None, found.profile)
    ]


def caveats(dataset: str, model: str, protocol: str) -> list[Caveat]:
    """Caveats for comparing a number with a published one."""
    return [
        caveat
        for caveat in load_caveats()
        if caveat.dataset == dataset and fnmatchcase(model, caveat.model) and caveat.protocol in ("*", protocol)
    ]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A result beside what is published."""

    reference: Reference
    delta: float
    """Ours minus theirs, 0..1."""
    comparable: bool
    """Whether both have the same profile and metric."""
    caveats: tuple[Caveat, ...]


def compare(result: Result, model: str | None) -> Compared | None:
    """The published number that is nearest to what a result measured; `model` is its published name, if it has one.

    The same metric is needed; the same profile is preferred, another one is taken and said to be not comparable.
    """
    if model is None:
        return None
    value = {**result.metrics, result.metric: result.value}
    found = [r for r in reference(result.dataset, model, result.protocol) if r.metric in value]
    found.sort(key=lambda r: (r.profile != result.profile, r.metric != result.metric))
    if not found:
        return None
    best = found[0]
    return Compared(
        reference=best,
        delta=value[best.metric] - best.value,
        comparable=best.profile == result.profile,
        caveats=tuple(caveats(result.dataset, model, result.protocol)),
    )


def published_name(facts: ModelFacts) -> str | None:
    """Under which name others know a model: only if what it was loaded from says so; a name alone proves nothing."""
    source = facts.source.removeprefix("hf-hub:").removeprefix("hub:")
    if source in _names():
        return source
    return _repositories().get(source)


def check_name(name: str) -> str:
    """A model that has published numbers; UsageError with the nearest names otherwise."""
    if name not in _names():
        raise unknown_name("published model", name, sorted(_names()))
    return name


@cache
def _names() -> frozenset[str]:
    return frozenset(found.model for found in load_references())


@cache
def _repositories() -> dict[str, str]:
    """Repository of the hub -> published name, where a table knows it."""
    published = json.loads(resources.files("diptych.assets").joinpath("published.json").read_text("utf-8"))
    return {entry["repository"]: name for name, entry in published["weights"].items() if name in _names()}


@cache
def _by_case() -> dict[tuple[str, str, str], list[Reference]]:
    cases: dict[tuple[str, str, str], list[Reference]] = {}
    for found in load_references():
        cases.setdefault((found.dataset, found.model, found.protocol), []).append(found)
    return cases


def _read_table(name: str) -> Iterator[Reference]:
    with _open(name) as lines:
        rows = csv.DictReader(lines)
        if set(rows.fieldnames or ()) != _COLUMNS:
            raise UsageError(f"{name} has the columns {rows.fieldnames}; it needs {sorted(_COLUMNS)}")
        for row in rows:
            if row["provenance"] not in ("confirmed", "unconfirmed"):
                raise UsageError(f"{name}: provenance {row['provenance']!r} is neither confirmed nor unconfirmed")
            yield Reference(
                dataset=row["dataset"],
                model=row["model"],
                protocol=row["protocol"],
                profile=row["profile"],
                metric=row["metric"],
                value=float(row["percent"]) / 100,
                confirmed=row["provenance"] == "confirmed",
                source=row["source"],
            )


def _open(name: str) -> io.StringIO:
    return io.StringIO(resources.files("diptych.assets").joinpath("reference", name).read_text("utf-8"))
