"""`diptych train`."""

import argparse
import dataclasses
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from diptych.errors import UsageError, unknown_name
from diptych.model.config import PRESETS, get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from diptych.train.recipe import CONTINUED, get_recipe

if TYPE_CHECKING:
    from diptych.evaluate.training_evaluators import TrainingEvaluator
    from diptych.image import Preprocess
    from diptych.tokenizer import Tokenizer
    from diptych.train.run_folder.report import Evaluation, StepReport, TrainReport
    from diptych.train.trainer import Evaluator


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from scratch, or continue the unfinished run in --out."""

    preset: Annotated[str, tyro.conf.Positional]
    """Architecture by name: ViT-B-32, RN50, ViT-Ti-16, ..."""
    data: tuple[str, ...]
    """Folders of shards or tars, here or at a URL (s3://bucket/shards, https://host/{00000..00099}.tar); PATH@0.5 sees
    half of it in an epoch, PATH@2 all of it twice."""
    out: Path
    """The run's folder: checkpoints, logs, config."""
    recipe: str | None = None
    """Whole sets of values, any of which the options below change: `paper` (Tables 18 to 20 for each of its models),
    `small-data`. `diptych train ViT-B-16 --recipe paper --help` shows them."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    evaluate: tuple[str, ...] = ()
    """NAME=PATH of sets to be asked about during training: class folders of pictures, shards with labels (zero-shot
    accuracy) or with captions (retrieval). NAME=zeroshot:PATH or NAME=retrieval:PATH chooses."""
    templates: tuple[str, ...] = ("simple",)
    """For zero-shot sets: names of template lists (simple, imagenet_80, imagenet_7, none), or templates with a {}."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __call__(self) -> int:
        if self.recipe == "paper" and self.preset in CONTINUED:
            before = CONTINUED[self.preset]
            raise UsageError(
                f"the paper's {self.preset} is not trained from scratch, but is {before} trained for one more epoch; "
                f"train {before}, give it larger pictures with diptych convert --image-size, then continue it with "
                "diptych finetune"
            )
        model = dataclasses.replace(get_preset(self.preset), logit_bias=self.loss.loss == "siglip")
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
            loss=self.loss,
            optim=self.optim,
            run=self.run,
        )
        evaluators = self._open_evaluators(config)
        report = train_with_progress(config, evaluators=evaluators)
        if is_first_rank():
            print_train_report(report)
            for evaluator in evaluators:
                if evaluator.broken:
                    print(f"  {evaluator.name}: pictures left out: {_counts(evaluator.broken)}")
        return 128 + signal.Signals[report.stopped_by] if report.stopped_by else 0

    def _open_evaluators(self, config: TrainConfig) -> "list[TrainingEvaluator]":
        """Before training: a set that is not there or a misspelled metric must not be found out at its end."""
        if not self.evaluate:
            check_keep_best(config.run.keep_best, [])
            return []
        from diptych.image import Preprocess
        from diptych.train.setup import load_tokenizer

        preprocess = Preprocess(image_size=config.model.vision.image_size)
        evaluators = build_evaluators(self.evaluate, load_tokenizer(config), preprocess, self.templates)
        check_keep_best(config.run.keep_best, evaluators)
        if is_first_rank():
            for evaluator in evaluators:
                print(describe_evaluator(evaluator))
        return evaluators


def with_recipe(arguments: Sequence[str]) -> type[Train]:
    """The command whose defaults are those of the recipe that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", nargs="?")
    name = parser.parse_known_args(arguments)[0].recipe
    preset = next((argument for argument in arguments if argument in PRESETS), None)
    if name is None or preset is None:  # the latter is refused where all names are
        return Train
    recipe = get_recipe(name, preset)
    fields = [(part.name, part.type, getattr(recipe, part.name)) for part in dataclasses.fields(recipe)]
    namespace = {"__doc__": Train.__doc__}
    return dataclasses.make_dataclass("Train", fields, bases=(Train,), namespace=namespace, frozen=True, kw_only=True)


def build_evaluators(
    specs: tuple[str, ...], tokenizer: "Tokenizer", preprocess: "Preprocess", templates: tuple[str, ...] = ("simple",)
) -> "list[TrainingEvaluator]":
    """Open the sets that `--evaluate` names; raises UsageError or NotFoundError for one that cannot be used."""
    from diptych.evaluate.results import Protocol
    from diptych.evaluate.training_evaluators import KINDS, TrainingEvaluator, open_set
    from diptych.templates import parse_templates

    prompts = parse_templates(templates)
    evaluators: dict[str, TrainingEvaluator] = {}
    for spec in specs:
        name, equals, place = spec.partition("=")
        if not (equals and name and place) or "/" in name:
            raise UsageError(f"{spec!r} is not NAME=PATH, NAME=zeroshot:PATH or NAME=retrieval:PATH (no / in the name)")
        if name in evaluators:
            raise UsageError(f"two evaluation sets are named {name!r}; give each a name of its own")
        protocol: Protocol | None = next((one for one in KINDS if place.startswith(f"{one}:")), None)
        exam = open_set(Path(place.removeprefix(f"{protocol}:")), protocol)
        evaluators[name] = TrainingEvaluator(name, exam, tokenizer, preprocess, prompts)
    return list(evaluators.values())


def check_keep_best(name: str | None, evaluators: "Sequence[TrainingEvaluator]") -> None:
    """Refuse a metric that no evaluation will yield."""
    known = [metric for evaluator in evaluators for metric in evaluator.metrics]
    if name is not None and not known:
        raise UsageError(f"keep_best {name} needs an evaluation that yields it; add --evaluate NAME=PATH")
    if name is not None and name not in known:
        raise unknown_name("keep_best metric", name, known)


def describe_evaluator(evaluator: "TrainingEvaluator") -> str:
    """What will be asked, and what was left out."""
    exam = evaluator.exam
    classes = f" of {len(exam.classnames)} classes" if exam.classnames else ""
    end = f"; left out: {_counts(exam.samples.skipped)}" if exam.samples.skipped else ""
    return f"evaluation {evaluator.name}: {exam.protocol} on {len(exam.samples)} pictures{classes}{end}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


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
    pace = 0.0  # seconds a pair, of the last steps; one step alone says little

    def show(report: "StepReport") -> None:
        nonlocal pace
        pace = 0.9 * pace + 0.1 / report.pairs_per_second if pace else 1 / report.pairs_per_second
        if not is_first_rank():
            return
        progress.start()  # at the first step, so that an error before it stays one line
        minutes, seconds = divmod(int(report.seconds_left), 60)
        status = (
            f"loss {report.loss:.3f}  {1 / pace:.0f} pairs/s  "
            f"data wait {report.data_wait:.0%}  {minutes}:{seconds:02d} left"
        )
        progress.update(task, total=report.steps, completed=report.step, status=status)

    try:
        return loop.run(
            config, on_step=show, evaluators=evaluators, on_evaluation=print_evaluation, on_note=print_on_first_rank
        )
    finally:
        if progress.live.is_started:
            progress.stop()


def print_on_first_rank(line: str) -> None:
    """One line of a job, said once."""
    if is_first_rank():
        print(line, flush=True)


def print_evaluation(evaluation: "Evaluation") -> None:
    """Fine-tuning: the headlines so far, of which the end shows all; training from scratch has nothing to compare."""
    from diptych.train.finetune.guard import HEADLINES

    if evaluation.start and 0 < evaluation.step < evaluation.steps:
        now = {name: value for name, value in evaluation.metrics.items() if name.endswith(HEADLINES)}
        print_on_first_rank(f"step {evaluation.step}, beside the start:")
        for line in describe_changes(evaluation.start, now or evaluation.metrics):
            print_on_first_rank(f"  {line}")


def describe_changes(start: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A line for each share: at the start, now, and the difference in points of a hundred."""
    from diptych.train.finetune.guard import changes

    found = changes(start, now)
    width = max((len(change.name) for change in found), default=0)
    return [
        f"{change.name:{width}}  start {change.start:7.2%}  now {change.now:7.2%}  "
        + (f"{'won' if change.points > 0 else 'lost':4} {abs(change.points):6.2f} points" if change.points else "same")
        for change in found
    ]


def is_first_rank() -> bool:
    """Whether this process speaks for its job (`torchrun` starts several)."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def print_train_report(report: "TrainReport") -> None:
    """Say how a run ended."""
    for line in report.passed_over:
        print(f"passed over a damaged checkpoint: {line}")
    if report.resumed_from:
        print(f"continued from step {report.resumed_from}")
    if report.skipped:
        print(f"skipped samples: {', '.join(f'{reason} {count}' for reason, count in report.skipped.items())}")
    print(f"step {report.steps}, {report.samples_seen} pairs seen, loss {report.loss:.4f}, {report.seconds:.0f} s")
    lines = [f"{name} {value:.4f}" for name, value in report.metrics.items()]
    for line in describe_changes(report.start_metrics, report.metrics) if report.start_metrics else lines:
        print(f"  {line}")
    print(f"checkpoint: {report.checkpoint}")
    if report.stopped_by:
        print(f"stopped by {report.stopped_by}; start the same command again to go on")
