"""`diptych evaluate`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diptych.cli.output import ProgressBar, counted, is_first_rank, list_counts, printable, shorten
from diptych.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from diptych.evaluate.cell import EvaluateProgress
    from diptych.evaluate.results import Result
    from diptych.evaluate.run import EvaluateReport


_WIDTH = 160
"""Width of a table that goes into a file, characters."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluateConfig):
    """Evaluate models by the paper's protocols. Resumable: rerun the same command to continue.

    Example: diptych evaluate --model ViT-B-32/openai --suite kornblith12 --data datasets
    """

    models: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="model")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name; NAME=SOURCE gives it a name.
    Several models: several times --model."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __call__(self) -> int:
        from diptych.evaluate.run import run

        with ProgressBar() as bar:

            def show(now: "EvaluateProgress") -> None:
                bar.update(now.done, now.total, what=f"{now.model} on {now.dataset} ({now.split})")

            report = run(self, on_progress=show)
        if is_first_rank():
            print_report(report, as_json=self.json)
        nothing = is_first_rank() and not report.results
        return 1 if report.refused or nothing else 0


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
            print(f"warning: {printable(f'{result.model}, {result.dataset}')}, {result.protocol}: {shorten(warning)}")
    for model, dataset, skipped in dict.fromkeys((r.model, r.dataset, list_counts(r.skipped)) for r in report.results):
        if skipped:
            print(f"skipped: {printable(f'{model}, {dataset}')}: pictures that cannot be used ({skipped})")
    for one in report.refused:
        protocol = f", {one.protocol}" if one.protocol else ""
        print(f"failed: {printable(f'{one.model}, {one.dataset}')}{protocol}: {shorten(one.reason)}")
    for name, where in report.missing.items():
        print(f"missing: {printable(name)} ({shorten(where)})")
    for protocol, kinds in report.unfit.items():
        print(f"not measured: {protocol}: it is for datasets of kind {kinds}, and there is none among these")
    new = len(report.results) - report.resumed
    before, out = f"{report.resumed} were there before", printable(report.out)
    print(f"{counted(new, 'result')}, {before}; {report.seconds:.0f} s; in {out}")


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
            *(Text(printable(name)) for name in (result.model, result.dataset, result.protocol, result.profile)),
            *(f"{result.images:,}", f"{result.value:.2%}", interval, chance, result.metric),
        )
    return table
