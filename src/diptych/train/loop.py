"""A training run: `run`.

Resume is exact. What is stored (weights, optimizer, random state, position in the data, length of the log) and what
is recomputed from it (sample order, crops, patches, learning rate) leave nothing that could differ, so that a run that
was killed ends with the same bits as one that was not. The number of ranks is no part of a run: it may change between
two starts, and changes nothing but the order in which floating-point numbers are added.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from diptych.files import hold_folder
from diptych.ranks import connect, disconnect, name_lost_ranks
from diptych.train.config import TrainConfig
from diptych.train.run_folder.report import Evaluation, StepReport, TrainReport
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
            return Trainer(config, ranks, on_note).run(evaluators, on_step, on_evaluation)
    finally:
        disconnect(ranks)
