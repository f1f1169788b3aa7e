"""How shards become batches: frozen values, no torch."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of shards, or one tar."""

    path: Path
    """Where it lies."""
    weight: float = 1.0
    """How many times an epoch each of its samples is seen."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UsageError(f"weight {self.weight} of {self.path} must be above 0; leave the source out instead")

    @classmethod
    def parse(cls, text: str) -> "SourceConfig":
        """Read `PATH` or `PATH@WEIGHT`."""
        path, at, weight = text.rpartition("@")
        if not at:
            return cls(path=Path(text))
        try:
            return cls(path=Path(path), weight=float(weight))
        except ValueError:
            raise UsageError(f"{text!r} is not PATH or PATH@WEIGHT, for example shards/photos@0.5") from None


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How pairs become batches."""

    batch_size: int = 256
    """Pairs in the global batch, over all ranks."""
    seed: int = 0
    """Of the sample order and the crops."""
    min_crop: float = 0.9
    """Side of the random square crop: uniform between this share of the shorter side and all of it."""
    workers: int = 1
    """Threads that read, decode and tokenize ahead; 0 does it in between the steps."""
    prefetch: int = 4
    """Batches kept ready; fewer if they would take more than 2 GiB."""
    strict: bool = False
    """Stop at the first sample that cannot be used, instead of counting it and going on."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise UsageError(f"batch_size {self.batch_size} leaves nothing to contrast with; use at least 2")
        if not 0 < self.min_crop <= 1:
            raise UsageError(f"min_crop {self.min_crop} is not a share in (0, 1]")
        if self.workers < 0 or self.prefetch < 1:
            raise UsageError(f"workers {self.workers} must be 0 or more, prefetch {self.prefetch} 1 or more")
