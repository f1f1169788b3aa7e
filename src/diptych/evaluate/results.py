"""Results of experiments as files: one folder for all, from which reports and figures are made.

    results/
      ViT-B-32/                  a model, by the name it was given
        model.json               `ModelFacts`
        cifar10/                 a dataset of the registry
          zeroshot.json          `Result`, one a protocol
          zeroshot.npz           scores [N, C] float32, labels [N], keys [N]: what the numbers were made of
          probe.json

A file is whole or not there; a protocol whose file is there is done. Nothing here imports torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from diptych import files
from diptych.config import from_dict, to_dict
from diptych.errors import NotFoundError, UsageError

Protocol = Literal["zeroshot", "prompts", "retrieval", "probe", "fewshot", "temporal", "bias", "overlap"]
"""zeroshot: section 3.1. prompts: the same with bare names, and a forward search over templates. retrieval: Table 13.
probe, fewshot: Appendix A and Figure 6. temporal: neighbouring frames (PM-k). bias: section 7. overlap: section 5."""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about a model that figures need."""

    name: str
    source: str
    """Checkpoint that it was loaded from, or name of a baseline."""
    space: str
    """Hash of weights, preprocessing and precision."""
    embed_dim: int
    image_size: int
    parameters: int | None = None
    gflops: float | None = None
    """GFLOPs of the image tower, for one picture."""
    baseline: bool = False
    """Whether it is not a CLIP: pictures to features only, no texts."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number that counts, and what belongs to it."""

    model: str
    dataset: str
    protocol: Protocol
    metric: str
    """Which of `metrics` is the headline: acc1, mean_per_class_recall, map_11_point, roc_auc, mean_top1_top5, ..."""
    value: float
    """0..1."""
    images: int
    split: str = "test"
    profile: str = "paper"
    """Whose prompts, splits and metric: paper, clip_benchmark or own."""
    ci95: tuple[float, float] | None = None
    """Wilson's interval of a share of pictures, else the bootstrap's."""
    chance: float | None = None
    """Value of this metric that guessing reaches."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> pictures that could not be used."""
    warnings: Sequence[str] = ()
    """Doubts about the number: at chance, labels that look permuted, a class without pictures, ..."""
    per_class: Sequence[Mapping[str, Any]] = ()
    """{"name", "images", "recall"} of each class, in order."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Facts that only this protocol has: strengths that were tried, values by shots and seeds, ..."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions, precision, seed, date, settings."""


def result_path(folder: Path, model: str, dataset: str, protocol: Protocol) -> Path:
    """Where a result lies."""
    return folder / model / dataset / f"{protocol}.json"


def save_result(folder: Path, result: Result) -> Path:
    """Write a result to its place."""
    path = result_path(folder, result.model, result.dataset, result.protocol)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"format": FORMAT, **_plain(result)})
    return path


def save_model(folder: Path, facts: ModelFacts) -> None:
    """Write what is known of a model into its folder."""
    (folder / facts.name).mkdir(parents=True, exist_ok=True)
    files.write_json(folder / facts.name / "model.json", to_dict(facts))


def load_result(path: Path) -> Result:
    """Read a result; UsageError for one of another format or damaged."""
    try:
        data = files.read_json(path)
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        if data.pop("format", None) != FORMAT:
            raise UsageError(f"{path} is not a result of format {FORMAT}; evaluate again")
        if data.get("ci95") is not None:
            data["ci95"] = tuple(data["ci95"])
        return Result(**data)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as a result ({error}); delete it and evaluate again") from None


def load_models(folder: Path) -> dict[str, ModelFacts]:
    """The models of a results folder by name, sorted."""
    if not folder.is_dir():
        raise NotFoundError(f"no results folder {folder}; `diptych evaluate` makes one")
    paths = sorted(folder.glob("*/model.json"))
    return {path.parent.name: _load_facts(path) for path in paths}


def _load_facts(path: Path) -> ModelFacts:
    try:
        return from_dict(ModelFacts, files.read_json(path))
    except (ValueError, TypeError, AttributeError, UsageError) as error:
        raise UsageError(f"{path} cannot be read ({error}); evaluate that model again") from None


def iter_results(folder: Path) -> Iterator[Result]:
    """All results of a folder, by model, dataset and protocol."""
    for path in sorted(folder.glob("*/*/*.json")):
        if path.stem in PROTOCOLS:
            yield load_result(path)


def _plain(result: Result) -> dict[str, Any]:
    """JSON has no NaN that all readers know: what is not a number becomes null."""
    return json.loads(json.dumps(vars(result)), parse_constant=lambda _: None)
