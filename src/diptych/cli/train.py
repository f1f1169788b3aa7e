"""`diptych train`."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from diptych.model.config import get_preset
from diptych.shards.config import LoaderConfig, SourceConfig
from diptych.train.config import LossConfig, OptimConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from diptych.train.loop import Evaluator, StepReport, TrainReport


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
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __call__(self) -> int:
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
        report = train_with_progress(config)
        if is_first_rank():
            print_train_report(report)
        return 128 + signal.Signals[report.stopped_by] if report.stopped_by else 0


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
        if not is_first_rank():
            return
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
    for name, value in report.metrics.items():
        print(f"  {name} {value:.4f}")
    print(f"checkpoint: {report.checkpoint}")
    if report.stopped_by:
        print(f"stopped by {report.stopped_by}; start the same command again to go on")
