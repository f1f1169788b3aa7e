"""`diptych evaluate`."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from diptych.cli.words import counted
from diptych.evaluate.config import EvaluateConfig, ProfileName
from diptych.evaluate.results import Protocol
from diptych.model.config import Activation, Precision

if TYPE_CHECKING:
    from diptych.evaluate.cell import EvaluateProgress
    from diptych.evaluate.results import Result
    from diptych.evaluate.run import EvaluateReport


_WIDTH = 160
"""Width of a table that goes into a file, characters."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate models by the paper's protocols. Resumable: rerun the same command to continue."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name; NAME=SOURCE gives it a name.
    Several models: several times --model."""
    suite: tuple[str, ...] = EvaluateConfig.suite
    """paper27, kornblith12, shifts, retrieval, clip_benchmark, made; datasets by id; TOML files of one's own."""
    out: Path = EvaluateConfig.out
    """The results folder: new, or one to go on with."""
    data: Path = EvaluateConfig.data
    """Where the datasets lie: a folder for each, by its id or by the name of its repository."""
    protocols: tuple[Protocol, ...] = ()
    """What is done with each dataset that allows it; by default zeroshot, retrieval or temporal, as its kind is."""
    profile: ProfileName = EvaluateConfig.profile
    """Whose class names, templates, splits and metric."""
    precision: Precision = EvaluateConfig.precision
    """Precision of the towers: exact, float32, bfloat16, int8 (image tower only); auto: bfloat16 where it is fast."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    device: str = EvaluateConfig.device
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    batch_size: int = EvaluateConfig.batch_size
    """Pictures that go through the tower at once."""
    download: bool = False
    """Fetch datasets that are not there, from the repositories that the registry names; ImageNet is 6 GB."""
    redo: bool = False
    """Compute results again that are there with other settings (data, model, seed, ...), else that is an error."""
    on_mismatch: Literal["stop", "warn"] = EvaluateConfig.on_mismatch
    """A dataset that is not what the registry says is refused with the reason, or evaluated with a warning."""
    cache: Path | None = None
    """Folder of computed image features; by default .features in the results folder."""
    cache_bytes: int = EvaluateConfig.cache_bytes
    """How large that folder may grow."""
    overlap: Path | None = None
    """overlap.parquet of `diptych curate contamination`, for the protocol overlap: one dataset at a time."""
    shots: tuple[int, ...] = EvaluateConfig.shots
    """Images a class for the protocol fewshot."""
    seeds: int = EvaluateConfig.seeds
    """Random draws for the protocol fewshot."""
    seed: int = EvaluateConfig.seed
    """Seed of every draw: bootstrap, prompt search, validation sets, shots."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __call__(self) -> int:
        from diptych.evaluate.run import run

        config = EvaluateConfig(
            models=self.model,
            suite=self.suite,
            out=self.out,
            data=self.data,
            protocols=self.protocols,
            profile=self.profile,
            precision=self.precision,
            activation=self.activation,
            preset=self.preset,
            device=self.device,
            batch_size=self.batch_size,
            download=self.download,
            redo=self.redo,
            on_mismatch=self.on_mismatch,
            cache=self.cache,
            cache_bytes=self.cache_bytes,
            overlap=self.overlap,
            shots=self.shots,
            seeds=self.seeds,
            seed=self.seed,
        )
        with _Bar() as show:
            report = run(config, on_progress=show)
        if _is_first():
            print_report(report, as_json=self.json)
        nothing = _is_first() and not report.results
        return 1 if report.refused or nothing else 0


class _Bar:
    """A progress bar that appears with the first pictures, so that an error before them stays one line."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not _is_first())
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> "Callable[[EvaluateProgress], None]":
        return self._show

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def _show(self, now: "EvaluateProgress") -> None:
        self.progress.start()
        what = f"{now.model} on {now.dataset} ({now.split})"
        self.progress.update(self.task, description=what, total=now.total, completed=now.done)


def _is_first() -> bool:
    """Whether this process is the one of a job that speaks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def print_report(report: "EvaluateReport", *, as_json: bool) -> None:
    """A table of the numbers, what makes them doubtful, and what is not there."""
    if as_json:
        results = [
            {name: value for name, value in vars(result).items() if name not in ("details", "per_class", "about")}
            for result in report.results
        ]
        refused = [vars(one) for one in report.refused]
        more = {
            "resumed": report.resumed,
            "missing": dict(report.missing),
            "refused": refused,
            "unfit": dict(report.unfit),
        }
        print(json.dumps({"results": results, **more, "out": str(report.out), "seconds": round(report.seconds, 3)}))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if report.results:
        console.print(_table(report.results))
    for result in report.results:
        for warning in result.warnings:
            print(f"warning: {result.model}, {result.dataset}, {result.protocol}: {warning}")
    for model, dataset, skipped in dict.fromkeys((r.model, r.dataset, _counts(r.skipped)) for r in report.results):
        if skipped:
            print(f"skipped: {model}, {dataset}: pictures that cannot be used ({skipped})")
    for one in report.refused:
        print(f"failed: {one.model}, {one.dataset}{', ' + one.protocol if one.protocol else ''}: {one.reason}")
    for name, where in report.missing.items():
        print(f"missing: {name} ({where})")
    for protocol, kinds in report.unfit.items():
        print(f"not measured: {protocol}: it is for datasets of kind {kinds}, and there is none among these")
    new = len(report.results) - report.resumed
    print(f"{counted(new, 'result')}, {report.resumed} were there before; {report.seconds:.0f} s; in {report.out}")


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))


def _table(results: "Sequence[Result]") -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("model", "left"), ("dataset", "left"), ("protocol", "left"), ("profile", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("images", "value", "95 %", "chance"):
        table.add_column(name, justify="right")
    table.add_column("metric")
    for result in results:
        interval = f"{result.ci95[0]:.1%} to {result.ci95[1]:.1%}" if result.ci95 else ""
        chance = f"{result.chance:.1%}" if result.chance is not None else ""
        table.add_row(
            *(result.model, result.dataset, result.protocol, result.profile),
            *(f"{result.images:,}", f"{result.value:.2%}", interval, chance, result.metric),
        )
    return table
