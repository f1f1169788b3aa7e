"""`diptych report`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diptych.cli.output import counted
from diptych.errors import UsageError

if TYPE_CHECKING:
    from diptych.evaluate.report.html import ReportFiles


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make a report of a results folder: one HTML file with all numbers and the paper's figures inside.

    Example: diptych report results --figures figures
    """

    results: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder that `diptych evaluate` wrote."""
    out: Path | None = None
    """The file to write; by default report.html in the results folder."""
    figures: Path | None = None
    """A folder for the figures as PNG and SVG, beside those inside of the report."""
    model: str | None = None
    """The model of figures that show one (5, 7, 8, 14, 15, 17); by default the one with most results."""
    published: tuple[str, ...] = ()
    """MODEL=NAME: a model of the results is the published NAME (RN50/openai), where its source does not say so."""
    imagenet_models: Path | None = None
    """A CSV of ImageNet models (model,imagenet,imagenet_v2,...) from which the lines of robustness are fitted."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __call__(self) -> int:
        from diptych.evaluate.metrics.robustness import read_table
        from diptych.evaluate.protocols.shifts import imagenet_subsets
        from diptych.evaluate.report.html import write_report
        from diptych.evaluate.report.results_table import load_study

        study = load_study(
            self.results,
            names=dict(_split(given) for given in self.published),
            shown=self.model,
            table=read_table(self.imagenet_models) if self.imagenet_models else (),
            subsets=imagenet_subsets(),
        )
        written = write_report(
            study,
            self.out or self.results / "report.html",
            title=f"Results in {self.results.resolve().name}",
            command=self._command(),
            figures=self.figures,
        )
        print_report(written, as_json=self.json)
        return 0

    def _command(self) -> str:
        """What to type to get this report again; paths as names only, since a report travels."""
        words = ["diptych", "report", self.results.name or "."]
        words += ["--model", self.model] if self.model else []
        words += ["--published", *self.published] if self.published else []
        words += ["--imagenet-models", self.imagenet_models.name] if self.imagenet_models else []
        return shlex.join(words)


def _split(given: str) -> tuple[str, str]:
    model, equals, name = given.partition("=")
    if not equals or not model or not name:
        raise UsageError(f"--published {given} says nothing; write MODEL=NAME, such as mine=ViT-B-32/openai")
    return model, name


def print_report(written: "ReportFiles", *, as_json: bool) -> None:
    """What was drawn, what was not and why, and where it lies."""
    if as_json:
        missing = [{"number": one.number, "why": one.why, "command": one.command} for one in written.missing]
        where = {"out": str(written.html), "figures": [str(path) for path in written.figures]}
        print(json.dumps({"results": written.results, "drawn": list(written.drawn), "missing": missing, **where}))
        return
    print(f"{counted(written.results, 'result')}; figures drawn: {', '.join(written.drawn) or 'none'}")
    if written.own and written.missing:
        numbers = ", ".join(one.number for one in written.missing)
        print(f"not drawn, for none of the paper's datasets was measured: {numbers} (the report says why)")
    for one in () if written.own else written.missing:
        print(f"figure {one.number} is not drawn: {one.why}")
    if written.figures:
        print(f"figures: {written.figures[0].parent}")
    print(f"report: {written.html}")
