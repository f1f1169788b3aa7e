"""`diptych embed`: folders, tars, tables and texts to a folder of features."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diptych.cli.output import ProgressBar, counted, format_time, list_counts, list_others, printable
from diptych.embed.bulk.config import EmbedConfig, OutputConfig, WorkConfig
from diptych.errors import PASSING
from diptych.model.config import Activation

if TYPE_CHECKING:
    from diptych.embed.bulk.run import EmbedProgress, EmbedReport


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Embed many images or texts into a folder of features. Resumable: rerun the same command to continue.

    Example: diptych embed ViT-B-32/openai photos/ --out features
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai)."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT ...")]
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
        with ProgressBar("embedding") as bar:

            def show(now: "EmbedProgress") -> None:
                skipped = f"  {now.skipped:,} skipped" if now.skipped else ""
                left = format_time(now.seconds_left or 0.0)
                bar.update(now.done, now.total, f"{now.per_second:,.0f}/s  {left} left{skipped}")

            report = run(config, on_progress=show)
        print_report(report, as_json=self.json)
        return 1 if report.skipped else 0


def print_report(report: "EmbedReport", *, as_json: bool) -> None:
    """How many of what, and where it lies."""
    new = report.inputs - report.resumed
    if as_json:
        skipped, passed = dict(report.skipped), dict(report.passed_over)
        counts = {"inputs": report.inputs, "features": report.features, "skipped": skipped, "passed_over": passed}
        more = {"resumed": report.resumed, "cut": report.cut, "precision": dict(report.precision)}
        more |= {"seconds": round(report.seconds, 3)}
        print(json.dumps(counts | more | {"out": str(report.out)}))
        return
    precision = ", ".join(f"{kind} {precision}" for kind, precision in report.precision.items())
    made = f"{counted(report.inputs, 'input')}, {counted(report.features, 'feature')}"
    print(f"{made} ({precision}), {report.seconds:.0f} s")
    if report.resumed:
        print(f"done before: {report.resumed:,}, now: {new:,}")
    if report.skipped:
        print(f"skipped: {list_counts(report.skipped)}; each is named in {printable(report.out / 'skipped.jsonl')}")
    if any(reason in PASSING for reason in report.skipped):
        print("some could not be read by a fault of the machine; the same command tries those again")
    if report.cut:
        print(f"texts that were longer than the model reads, and cut: {report.cut:,}")
    if report.passed_over:
        print(f"files that were not taken for pictures: {list_others(report.passed_over)}")
    print(f"features: {printable(report.out / 'features')}")
