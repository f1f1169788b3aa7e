"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

This is the only module that prints.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from diptych.errors import DiptychError, NotFoundError, PictureError, UsageError
from diptych.model.config import get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import OptimConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from diptych.train.loop import Evaluator, StepReport, TrainReport

DEFAULT_MODEL = Path("runs/demo")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from scratch, or continue the unfinished run in --out."""

    preset: Annotated[str, tyro.conf.Positional]
    """Architecture by name: ViT-B-32, RN50, ViT-Ti-16, ..."""
    data: tuple[str, ...]
    """Folders of shards or tars; PATH@0.5 sees half of it in an epoch, PATH@2 all of it twice."""
    out: Path
    """The run's folder: checkpoints, logs, config."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __call__(self) -> int:
        model = get_preset(self.preset)
        if self.tokenizer is not None:
            from diptych.tokenizer import Tokenizer

            text = dataclasses.replace(model.text, vocab_size=Tokenizer.load(self.tokenizer).vocab_size)
            model = dataclasses.replace(model, text=text)
        config = TrainConfig(
            model=model,
            data=tuple(SourceConfig.parse(text) for text in self.data),
            out=self.out,
            tokenizer=self.tokenizer,
            loader=self.loader,
            optim=self.optim,
            run=self.run,
        )
        report = train_with_progress(config)
        print_train_report(report)
        return 0


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Name what is on pictures, choosing among labels the model was never trained on."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, or globs."""
    labels: tuple[str, ...]
    """What to choose from; a|b gives two names to one class."""
    model: Path | None = None
    """A checkpoint or a run's folder; by default the one that `make demo` made."""
    templates: tuple[str, ...] = ("simple",)
    """Names of template lists (simple, imagenet_80, imagenet_7, none), or templates with a {}."""
    top: int = 5
    """Labels to show for each picture."""
    json: bool = False
    """Print one JSON object a line instead of bars."""

    def __call__(self) -> int:
        from diptych.checkpoint import load
        from diptych.zeroshot import ZeroShotClassifier, load_templates

        paths = find_pictures(self.images)
        templates = [t for name in self.templates for t in ([name] if "{}" in name else load_templates(name))]
        names = [label.split("|") if "|" in label else label for label in self.labels]
        classifier = ZeroShotClassifier(load(self.model or default_model()), names, templates)
        failed = 0
        for path in paths:
            try:
                scores = classifier.predict_proba([path])[0]
            except PictureError as error:
                failed += 1
                print(f"{path}: skipped, {error}", file=sys.stderr)
                continue
            order = scores.argsort()[::-1][: self.top]
            answers = [(str(classifier.classes_[i]), float(scores[i])) for i in order]
            print_answers(path, answers, as_json=self.json)
        if failed:
            print(f"{failed} of {len(paths)} pictures were skipped", file=sys.stderr)
        return 1 if failed else 0


COMMANDS: dict[str, type[Train] | type[Classify]] = {"train": Train, "classify": Classify}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; our errors are one line and exit code 2."""
    command: Train | Classify = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="diptych",
        description="Build and use CLIP models from end to end.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        code = command()
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def train_with_progress(config: TrainConfig, *, evaluators: "Sequence[Evaluator]" = ()) -> "TrainReport":
    """Run training under a progress bar: loss, pairs/s, share of time spent waiting for data, time left."""
    from diptych.train import loop

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("training", total=None, status="")

    def show(report: "StepReport") -> None:
        progress.start()  # at the first step, so that an error before it stays one line
        minutes, seconds = divmod(int(report.seconds_left), 60)
        status = (
            f"loss {report.loss:.3f}  {report.pairs_per_second:.0f} pairs/s  "
            f"data wait {report.data_wait:.0%}  {minutes}:{seconds:02d} left"
        )
        progress.update(task, total=report.steps, completed=report.step, status=status)

    try:
        return loop.run(config, on_step=show, evaluators=evaluators)
    finally:
        if progress.live.is_started:
            progress.stop()


def print_train_report(report: "TrainReport") -> None:
    """Say how a run ended."""
    for line in report.passed_over:
        print(f"passed over a damaged checkpoint: {line}")
    if report.resumed_from:
        print(f"continued from step {report.resumed_from}")
    if report.skipped:
        print(f"skipped samples: {', '.join(f'{reason} {count}' for reason, count in report.skipped.items())}")
    print(f"step {report.steps}, {report.samples_seen} pairs seen, loss {report.loss:.4f}, {report.seconds:.0f} s")
    for name, value in report.metrics.items():
        print(f"  {name} {value:.4f}")
    print(f"checkpoint: {report.checkpoint}")


def print_answers(path: Path, answers: list[tuple[str, float]], *, as_json: bool) -> None:
    """One picture's labels: bars for people, JSON for machines."""
    if as_json:
        print(json.dumps({"image": str(path), "labels": [{"label": n, "probability": p} for n, p in answers]}))
        return
    table = Table(title=str(path), title_justify="left", show_header=False, box=None)
    for label, probability in answers:
        table.add_row(f"{probability:6.1%}", label, "█" * round(probability * 30))
    Console().print(table)


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files as they are, folders for the pictures in them, globs for what they match; in a stable order."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        elif path.exists() or not any(sign in pattern for sign in "*?["):
            if not path.exists():
                raise NotFoundError(f"no such picture: {path}")
            found.append(path)
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            found += sorted(anchor.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    if not found:
        raise NotFoundError(f"no pictures in {' '.join(patterns)} (looked for {' '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def default_model() -> Path:
    """The model that is used when none is named."""
    if not DEFAULT_MODEL.is_dir():
        raise UsageError(f"no model was named and {DEFAULT_MODEL} does not exist; pass --model, or run `make demo`")
    return DEFAULT_MODEL
