"""What `train`, `finetune` and `wise-ft` share: evaluation sets, progress, and what is said at the end."""

import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from diptych import machine
from diptych.cli.output import (
    ProgressBar,
    format_time,
    is_first_rank,
    list_counts,
    print_on_first_rank,
    printable,
    shorten,
)
from diptych.errors import UsageError, unknown_name
from diptych.model.config import CLIPConfig
from diptych.templates import SIMPLE, parse_templates
from diptych.train.config import TrainConfig

LOST_STATUS = 3
"""Exit status of a run that the guard ended."""
COLLAPSE = 4.0
"""Share of its speed, inverted, that a run has lost when something is said."""

if TYPE_CHECKING:
    from diptych.evaluate.training_evaluators import TrainingEvaluator
    from diptych.image import Preprocess
    from diptych.tokens import BaseTokenizer
    from diptych.train.run_folder.report import Evaluation, StepReport, TrainReport
    from diptych.train.trainer import Evaluator


def build_evaluators(
    specs: tuple[str, ...],
    tokenizer: "BaseTokenizer",
    preprocess: "Preprocess",
    templates: tuple[str, ...] = SIMPLE,
    caption_key: str | None = None,
) -> "list[TrainingEvaluator]":
    """Open the sets that `--evaluate` names; raises UsageError or NotFoundError for one that cannot be used."""
    from diptych.evaluate.results import Protocol
    from diptych.evaluate.training_evaluators import KINDS, TrainingEvaluator, open_set

    evaluators: dict[str, TrainingEvaluator] = {}
    for spec in specs:
        name, equals, place = spec.partition("=")
        if not equals and Path(spec).exists():  # its own name is as good as any
            name, equals, place = Path(spec).resolve().stem, "=", spec
        if not (equals and name and place) or "/" in name:
            raise UsageError(f"{spec!r} is not NAME=PATH, NAME=zeroshot:PATH or NAME=retrieval:PATH (no / in the name)")
        if name in evaluators:
            raise UsageError(f"two evaluation sets are named {name!r}; give each a name of its own")
        protocol: Protocol | None = next((one for one in KINDS if place.startswith(f"{one}:")), None)
        exam = open_set(Path(place.removeprefix(f"{protocol}:")), protocol, caption_key)
        evaluators[name] = TrainingEvaluator(name, exam, tokenizer, preprocess, templates)
    return list(evaluators.values())


def choose_templates(given: tuple[str, ...] | None, config: CLIPConfig) -> tuple[str, ...]:
    """The templates that are asked for, else those that the model was trained for."""
    from diptych.zeroshot import suitable_templates

    return suitable_templates(config) if given is None else parse_templates(given)


def open_evaluators(
    specs: tuple[str, ...],
    load_tokenizer: "Callable[[], BaseTokenizer]",
    preprocess: "Preprocess",
    templates: tuple[str, ...],
    config: TrainConfig,
) -> "list[TrainingEvaluator]":
    """Open what `--evaluate` names before training and say so: a set that is not there, or a misspelled metric, must
    not be found out at its end."""
    key = config.loader.caption_key
    evaluators = build_evaluators(specs, load_tokenizer(), preprocess, templates, key) if specs else []
    check_keep_best(config.run.keep_best, evaluators)
    for evaluator in evaluators:
        print_on_first_rank(describe_evaluator(evaluator))
    return evaluators


def run_and_report(config: TrainConfig, evaluators: "Sequence[TrainingEvaluator]") -> int:
    """Train under a progress bar, say how it ended, and give the exit status."""
    report = train_with_progress(config, evaluators=evaluators)
    if is_first_rank():
        print_train_report(report)
        for evaluator in evaluators:
            if evaluator.broken:
                print(f"  {printable(evaluator.name)}: pictures left out: {list_counts(evaluator.broken)}")
        told = report.resumed_from == report.steps and (config.out / "report.html").exists()
        if not told and report.stopped_by != "SIGTERM":  # whoever sends it waits for seconds only
            examples = {evaluator.name: evaluator.examples for evaluator in evaluators}
            write_page(lambda page: page.write_run_page(config, report, examples))
        if report.lost:
            print(
                f"stopped: more than {config.start.stop_when_lost:g} points lost in {printable(', '.join(report.lost))}"
            )
    if report.lost:
        return LOST_STATUS
    return 128 + signal.Signals[report.stopped_by] if report.stopped_by else 0


def write_page(write: "Callable[[ModuleType], Path]") -> None:
    """Write the page that a run ends with, and say where. The run is whole whatever becomes of it."""
    try:
        from diptych.train import page

        print(f"report: {printable(write(page))}")
    except Exception as error:
        print(f"warning: report.html was not written: {shorten(error) or type(error).__name__}", file=sys.stderr)


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
    end = f"; left out: {list_counts(exam.samples.skipped)}" if exam.samples.skipped else ""
    return f"evaluation {printable(evaluator.name)}: {exam.protocol} on {len(exam.samples)} pictures{classes}{end}"


class Pace:
    """Pairs a second over the last steps, of which one alone says little; tells once that other programs took them."""

    def __init__(self) -> None:
        self._seconds = self._least = math.inf  # a pair
        self._told = False

    @property
    def speed(self) -> float:
        """Pairs a second."""
        return 1 / self._seconds

    def take(self, pairs_per_second: float) -> str | None:
        """Note the speed of a step; what there is to say about it."""
        now = 1 / pairs_per_second
        self._seconds = now if self._seconds == math.inf else 0.9 * self._seconds + 0.1 * now
        self._least = min(self._least, self._seconds)
        if self._told or self._seconds < COLLAPSE * self._least or machine.busy_cores() < 1.5 * machine.count_cores():
            return None
        self._told = True
        return (
            f"{self.speed:.0f} pairs/s, {1 / self._least:.0f} before: other programs use these cores. Ctrl-C and the "
            "same command again goes on from here with threads that sleep while they wait"
        )


def train_with_progress(config: TrainConfig, *, evaluators: "Sequence[Evaluator]" = ()) -> "TrainReport":
    """Run training under a progress bar: loss, pairs/s, share of time spent waiting for data, time left."""
    from diptych.train import loop

    pace = Pace()
    with ProgressBar("training") as bar:

        def show(report: "StepReport") -> None:
            if note := pace.take(report.pairs_per_second):
                print_on_first_rank(note)
            left, wait = format_time(report.seconds_left), f"data wait {report.data_wait:.0%}"
            bar.update(
                report.step, report.steps, f"loss {report.loss:.3f}  {pace.speed:.0f} pairs/s  {wait}  {left} left"
            )

        return loop.run(
            config, on_step=show, evaluators=evaluators, on_evaluation=print_evaluation, on_note=print_on_first_rank
        )


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

    found = [replace(change, name=printable(change.name)) for change in changes(start, now)]
    width = max((len(change.name) for change in found), default=0)
    return [
        f"{change.name:{width}}  start {change.start:7.2%}  now {change.now:7.2%}  "
        + (f"{'won' if change.points > 0 else 'lost':4} {abs(change.points):6.2f} points" if change.points else "same")
        for change in found
    ]


def print_train_report(report: "TrainReport") -> None:
    """Say how a run ended."""
    for line in report.passed_over:
        print(f"ignored a damaged checkpoint: {printable(line)}")
    if report.resumed_from == report.steps:
        print("nothing was left to train: the run was done before")
    elif report.resumed_from:
        print(f"continued from step {report.resumed_from}")
    if report.skipped:
        print(f"skipped samples: {list_counts(report.skipped)}")
    print(f"step {report.steps}, {report.samples_seen} pairs seen, loss {report.loss:.4f}, {report.seconds:.0f} s")
    lines = [f"{printable(name)} {value:.4f}" for name, value in report.metrics.items()]
    for line in describe_changes(report.start_metrics, report.metrics) if report.start_metrics else lines:
        print(f"  {line}")
    print(f"checkpoint: {printable(report.checkpoint)}")
    if report.stopped_by:
        print(f"stopped by {report.stopped_by}; start the same command again to go on")
