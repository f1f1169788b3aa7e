"""Logs of a run. JSON lines always; TensorBoard and Weights & Biases where they are asked for.

metrics.jsonl    what must come out the same again: loss, learning rate, gradient norms, evaluations
timing.jsonl     what depends on the clock: pairs/s, share of waiting, memory
skipped.jsonl    pictures that could not be used, with the reason
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diptych.errors import UsageError, install
from diptych.train.config import Sink

METRICS, TIMING, SKIPPED = "metrics.jsonl", "timing.jsonl", "skipped.jsonl"
EXACT = (METRICS, SKIPPED)
"""Logs that a resumed run continues without a seam."""


class Writer(Protocol):
    """Something that shows numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step."""

    def close(self) -> None:
        """Nothing comes after it."""


class Logs:
    """The logs of one run, written by its first rank; on the others nothing is."""

    def __init__(self, out: Path, sinks: Sequence[Sink], *, active: bool) -> None:
        self.out, self.active = out, active
        self.writers = [WRITERS[sink](out) for sink in sinks] if active else []

    def open(self, sizes: Mapping[str, int]) -> None:
        """Cut the exact logs back to the sizes that a checkpoint knows of, so that no step is in them twice."""
        if not self.active:
            return
        for name in EXACT:
            (self.out / name).touch()
            size = sizes.get(name, 0)
            with open(self.out / name, "r+b") as log:
                held = log.read()
                if len(held) < size:  # truncating would fill it up with zeros
                    warnings.warn(
                        f"{self.out / name} has lost {size - len(held):,} bytes since the last checkpoint: its lines "
                        "go on from what is there",
                        stacklevel=2,
                    )
                    size = held.rfind(b"\n") + 1
                log.truncate(size)
        if not sizes:
            (self.out / TIMING).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of the exact logs, to be stored in a checkpoint."""
        return {name: (self.out / name).stat().st_size for name in EXACT} if self.active else {}

    def files(self) -> list[Path]:
        """Every log that is there."""
        return [self.out / name for name in (*EXACT, TIMING) if (self.out / name).exists()]

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """One line."""
        if self.active:
            with open(self.out / name, "a", encoding="utf-8") as log:
                log.write(json.dumps(values) + "\n")

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for whoever watches."""
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        """End of the run."""
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named as the folder, continued when the run is."""

    def __init__(self, out: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise _missing("wandb") from None
        self._run = wandb.init(project="diptych", name=out.name, id=out.name, dir=str(out), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Say that the run is over."""
        self._run.finish()


def _missing(package: str) -> UsageError:
    return UsageError(f"--log {package} needs a package that is not installed: {install(package)}")


WRITERS: Mapping[Sink, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
