"""Reports of a run: after a step, after an evaluation, at its end; and how fast it goes."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diptych import machine
from diptych.model.clip import CLIP
from diptych.shards.loader import Batch


@dataclass
class State:
    """Everything that changes from step to step besides weights and optimizer."""

    step: int = 0
    samples_seen: int = 0
    lr: float = 0.0
    loss: float = math.nan
    grad_norms: tuple[float, float] = (math.nan, math.nan)
    log_bytes: dict[str, int] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    start_metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics after a step; for a fine-tuned model also those before the first one."""

    step: int
    steps: int
    metrics: Mapping[str, float]
    start: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step, as it is logged and shown."""

    step: int
    steps: int
    loss: float
    lr: float
    logit_scale: float
    """exp(t): what similarities are multiplied with."""
    grad_norm_image: float
    """Length of the image tower's gradient, before any shortening."""
    grad_norm_text: float
    samples_seen: int
    pairs_per_second: float
    """Over the steps since the last report, all ranks together."""
    data_wait: float
    """Share of the time that was spent waiting for data, 0..1."""
    memory: int
    """Most memory that this rank has held so far, bytes: of the GPU, or of the process."""
    seconds_left: float


CLOCK = ("pairs_per_second", "data_wait", "memory", "seconds_left")
"""Fields that depend on the clock and the machine, and so stand in timing.jsonl."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The end of a run."""

    steps: int
    samples_seen: int
    resumed_from: int
    """Step the run was continued from; 0 for a fresh one."""
    passed_over: tuple[str, ...]
    """Checkpoints that were damaged and so not continued from, with the reason."""
    loss: float
    skipped: dict[str, int]
    """Pictures that could not be used, by reason: in the shards' indexes and while training."""
    metrics: dict[str, float]
    """Numbers of the last evaluation."""
    start_metrics: dict[str, float]
    """Fine-tuning: of the model it started from."""
    lost: tuple[str, ...]
    """Fine-tuning: metrics that fell by more than `stop_when_lost` points, which ended the run."""
    checkpoint: Path
    micro_batch_size: int
    """Pairs of a rank that were in memory at once."""
    stopped_by: str | None
    """Signal that ended the run before its last step."""
    seconds: float


class Clock:
    """Speed of a run, and the time it spends waiting for data."""

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.steps, self.batch_size, self.device = steps, batch_size, device
        self._last = time.monotonic()
        self._waited = 0.0
        self._smooth = 0.0

    def take(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took to come is in the next report."""
        began = time.monotonic()
        batch = next(batches)
        self._waited = time.monotonic() - began
        return batch

    def report(self, state: State, model: CLIP) -> StepReport:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._smooth = 0.9 * self._smooth + 0.1 * seconds if self._smooth else seconds
        return StepReport(
            step=state.step,
            steps=self.steps,
            loss=state.loss,
            lr=state.lr,
            logit_scale=model.logit_scale.exp().item(),
            grad_norm_image=state.grad_norms[0],
            grad_norm_text=state.grad_norms[1],
            samples_seen=state.samples_seen,
            pairs_per_second=self.batch_size / seconds,
            data_wait=min(1.0, self._waited / seconds),
            memory=peak_memory(self.device),
            seconds_left=self._smooth * (self.steps - state.step),
        )


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()
