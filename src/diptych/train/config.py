"""How a model is trained: frozen values, no torch. Defaults are the paper's (Table 18) unless a line says otherwise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError
from diptych.model.config import CLIPConfig
from diptych.shards.config import LoaderConfig, SourceConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay, linear warm-up, cosine decay to zero."""

    lr: float = 5e-4
    """Peak learning rate."""
    warmup: int = 2000
    """Steps over which the rate rises to its peak."""
    weight_decay: float = 0.2
    """On every weight that is not a gain or a bias."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float | None = None
    """Decay of its square; by default the paper's: 0.98 for a ViT, 0.999 for a ResNet."""
    eps: float | None = None
    """By default the paper's: 1e-6 for a ViT, 1e-8 for a ResNet."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup < 0 or self.weight_decay < 0:
            raise UsageError(
                f"lr {self.lr} must be above 0, warmup {self.warmup} and weight_decay {self.weight_decay} not below"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how exactly, and what is kept."""

    epochs: float = 32.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    precision: Precision = "auto"
    """Of the towers' matrix products. auto: bfloat16 where the processor multiplies it fast (a GPU, a CPU with AMX),
    float32 elsewhere. Weights, loss and optimizer are always float32."""
    compile: bool = False
    """Compile both towers. Text is then padded to a multiple of 8 tokens, so that each length is compiled once."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    evaluate_every: int | None = None
    """Steps between evaluations; the last step always makes one."""

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise UsageError(f"steps {self.steps} and epochs {self.epochs} must be above 0")
        if self.checkpoint_every < 1:
            raise UsageError(f"checkpoint_every {self.checkpoint_every} must be at least 1 step")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: CLIPConfig
    """The towers; see `diptych.model.config.PRESETS`."""
    data: tuple[SourceConfig, ...]
    """Folders of shards, and how often each is seen."""
    out: Path
    """The run's folder: checkpoints, logs, config. An unfinished run in it is continued."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How pairs become batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights change."""
    run: RunConfig = field(default_factory=RunConfig)
    """How long, how exactly, and what is kept."""
