"""`diptych embed`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from diptych.cli.words import counted
from diptych.embed.bulk.config import EmbedConfig, OutputConfig, WorkConfig
from diptych.model.config import Activation

if TYPE_CHECKING:
    from diptych.embed.bulk.run import EmbedProgress, EmbedReport


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed many images or texts into a folder of features. Resumable: rerun the same command to continue."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders, globs, pictures, shards (.tar, or a folder of them), file.parquet:column, text files of one text a
    line."""
    out: Path
    """The folder of features: new, or one that the same command began."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    json: bool = False
    """Print one JSON object instead of lines."""
    output: OutputConfig = field(default_factory=OutputConfig)
    work: WorkConfig = field(default_factory=WorkConfig)

    def __call__(self) -> int:
        from diptych.embed.bulk.run import run

        config = EmbedConfig(
            model=self.model,
            inputs=self.inputs,
            out=self.out,
            activation=self.activation,
            preset=self.preset,
            output=self.output,
            work=self.work,
        )
        with _Bar() as show:
            report = run(config, on_progress=show)
        print_report(report, as_json=self.json)
        return 1 if report.skipped else 0


class _Bar:
    """A progress bar that appears with the first batch, so that an error before it stays one line."""

    def __init__(self) -> None:
        columns = TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("embedding", total=None, status="")

    def __enter__(self) -> "Callable[[EmbedProgress], None]":
        return self._show

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def _show(self, now: "EmbedProgress") -> None:
        self.progress.start()
        minutes, seconds = divmod(int(now.seconds_left or 0), 60)
        status = f"{now.per_second:,.0f}/s  {minutes}:{seconds:02d} left"
        if now.skipped:
            status += f"  {now.skipped:,} skipped"
        self.progress.update(self.task, total=now.total, completed=now.done, status=status)


def print_report(report: "EmbedReport", *, as_json: bool) -> None:
    """How many of what, and where it lies."""
    new = report.inputs - report.resumed
    if as_json:
        skipped, passed = dict(report.skipped), dict(report.passed_over)
        counts = {"inputs": report.inputs, "features": report.features, "skipped": skipped, "passed_over": passed}
        more = {"resumed": report.resumed, "precision": dict(report.precision), "seconds": round(report.seconds, 3)}
        print(json.dumps(counts | more | {"out": str(report.out)}))
        return
    precision = ", ".join(f"{kind} {precision}" for kind, precision in report.precision.items())
    made = f"{counted(report.inputs, 'input')}, {counted(report.features, 'feature')}"
    print(f"{made} ({precision}), {report.seconds:.0f} s")
    if report.resumed:
        print(f"done before: {report.resumed:,}, now: {new:,}")
    if report.skipped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.skipped.items())
        print(f"skipped: {reasons}; each is named in {report.out / 'skipped.jsonl'}")
    if report.passed_over:
        others = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in report.passed_over.items())
        print(f"files that were not taken for pictures: {others}")
    print(f"features: {report.out / 'features'}")
