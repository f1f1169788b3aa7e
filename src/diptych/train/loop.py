"""The training loop: `run`.

Resume is exact. What is stored (weights, optimizer, random state, position in the data, length of the log) and what
is recomputed from it (sample order, crops, patches, learning rate) leave nothing that could differ, so that a run that
was killed ends with the same bits as one that was not. The number of ranks is no part of a run: it may change between
two starts, and changes nothing but the order in which floating-point numbers are added.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from diptych.checkpoint.formats import native
from diptych.files import hold_folder
from diptych.ranks import connect, disconnect, name_lost_ranks
from diptych.train.config import TrainConfig
from diptych.train.run_folder.report import Clock, Evaluation, StepReport, TrainReport
from diptych.train.trainer import Evaluator, Trainer


def run(
    config: TrainConfig,
    *,
    evaluators: Sequence[Evaluator] = (),
    on_step: Callable[[StepReport], None] = lambda _: None,
    on_evaluation: Callable[[Evaluation], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> TrainReport:
    """Train, or continue the unfinished run in `config.out`; on every rank of the job that the environment names."""
    ranks = connect(config.run.timeout, config.run.device)
    try:
        with ExitStack() as stack:
            stack.enter_context(name_lost_ranks(ranks))
            if ranks.is_first:
                stack.enter_context(hold_folder(config.out))
            ranks.barrier()
            trainer = Trainer(config, ranks, on_note)
            return _run(trainer, evaluators, on_step, on_evaluation)
    finally:
        disconnect(ranks)


def _run(
    trainer: Trainer,
    evaluators: Sequence[Evaluator],
    on_step: Callable[[StepReport], None],
    on_evaluation: Callable[[Evaluation], None],
) -> TrainReport:
    started, config, ranks = time.monotonic(), trainer.config, trainer.ranks
    resumed_from, passed_over = trainer.resume()
    clock = Clock(trainer.steps, config.loader.batch_size, trainer.device)
    with closing(iter(trainer.loader)) as batches, closing(trainer), _Signals() as signals:
        if config.start_model is not None and not trainer.state.step and evaluators:
            on_evaluation(trainer.evaluate(evaluators))
        while trainer.state.step < trainer.steps and not trainer.lost():
            trainer.train_step(clock.take(batches))
            trainer.log_step(report := clock.report(trainer.state, trainer.model))
            on_step(report)
            if trainer.is_due(trainer.evaluate_every) and evaluators:
                on_evaluation(trainer.evaluate(evaluators))
            stop = ranks.all_reduce_max(float(signals.number)) if ranks.world_size > 1 else signals.number
            late = ranks.all_reduce_max(float(trainer.keeper.is_late())) if config.run.checkpoint_minutes else False
            if stop or late or trainer.lost() or trainer.keeper.is_due(trainer.state.step, trainer.steps):
                trainer.save()
            if stop:
                break
    return TrainReport(
        steps=trainer.state.step,
        samples_seen=trainer.state.samples_seen,
        resumed_from=resumed_from,
        passed_over=passed_over,
        loss=trainer.state.loss,
        skipped=dict(Counter(reason for *_, reason in trainer.skipped_by_index) + trainer.state.skipped),
        metrics=trainer.state.metrics,
        start_metrics=trainer.state.start_metrics,
        lost=trainer.lost(),
        checkpoint=native.step_folder(config.out, trainer.state.step),
        micro_batch_size=trainer.micro_batch_size or 0,
        stopped_by=signals.name if trainer.state.step < trainer.steps else None,
        seconds=time.monotonic() - started,
    )


class _Signals:
    """SIGTERM and Ctrl-C end a run behind its step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal that came, if one did."""
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
