"""How a model is trained: frozen values, no torch. Defaults are the paper's (Table 18) unless a line says otherwise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.config import MAY_CHANGE, require_finite
from diptych.errors import UsageError, unknown_name
from diptych.model.config import Activation, CLIPConfig, ViTConfig
from diptych.shards.config import LoaderConfig, SourceConfig

TrainPrecision = Literal["auto", "float32", "bfloat16"]
LossName = Literal["clip", "siglip"]
Positives = Literal["pair", "caption", "image", "either"]
Sharding = Literal["ddp", "fsdp"]
Sink = Literal["tensorboard", "wandb"]
Lock = Literal["none", "image", "text"]
CacheFeatures = Literal["auto", "on", "off"]
FeatureType = Literal["float32", "float16"]


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and value <= 0:
            raise UsageError(f"{name} {value} must be above 0")


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
    max_grad_norm: float | None = None
    """Gradients longer than this (over all weights) are shortened to it; the paper does not."""
    half_statistics: bool = False
    """Keep both of Adam's statistics in 16 bits, as the paper did (section 2.5): half the optimizer's memory."""

    def __post_init__(self) -> None:
        require_finite(self)
        if self.lr <= 0 or self.warmup < 0 or self.weight_decay < 0:
            raise UsageError(
                f"lr {self.lr} must be above 0, warmup {self.warmup} and weight_decay {self.weight_decay} not below"
            )
        for name in ("beta1", "beta2"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise UsageError(f"{name} {value} is not a share in [0, 1)")
        _require_positive(self, "eps", "max_grad_norm")  # a norm below 0 would turn every gradient round


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss and its regularisation."""

    loss: LossName = "clip"
    """`clip`: the paper's cross-entropy over the batch. `siglip`: a yes or no for each pair (Zhai et al. 2023)."""
    positives: Positives = "pair"
    """Right answers besides a pair's own: pairs of the batch with an equal caption, an equal picture, or either."""
    patch_dropout: float = 0.0
    """Share of a ViT's patches that are not looked at while training (FLIP, Li et al. 2023), 0 to below 1."""

    def __post_init__(self) -> None:
        require_finite(self)
        if not 0 <= self.patch_dropout < 1:
            raise UsageError(f"patch_dropout {self.patch_dropout} is not a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how exactly, on what, and what is kept."""

    epochs: float = 32.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    extend_to: int | None = field(default=None, metadata=MAY_CHANGE)
    """Continue a run to this many steps, with a learning rate that falls to zero there instead."""
    precision: TrainPrecision = "auto"
    """Precision of the towers' matrix products. auto: bfloat16 where the processor multiplies it fast (a GPU, a CPU
    with AMX or AVX512-BF16), float32 elsewhere. Weights, loss and optimizer are always float32."""
    compile: bool = False
    """Compile both towers. Text is then padded to a multiple of 8 tokens, so that each length is compiled once."""
    device: str = field(default="auto", metadata=MAY_CHANGE)
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    micro_batch_size: int | None = field(default=None, metadata=MAY_CHANGE)
    """Pairs of a rank that are in memory at once; by default as many as fit. Fewer than the rank's part of the batch
    are computed twice (gradient caching), with the same result."""
    sharding: Sharding = field(default="ddp", metadata=MAY_CHANGE)
    """Over several ranks: `ddp` keeps the whole model on each, `fsdp` (FSDP2) a part of it."""
    recompute: bool = field(default=False, metadata=MAY_CHANGE)
    """Keep the inputs of each Transformer block only and compute the block again for its derivatives."""
    timeout: float = field(default=600.0, metadata=MAY_CHANGE)
    """Seconds after which a rank that waits for a lost one gives up."""
    checkpoint_every: int = field(default=1000, metadata=MAY_CHANGE)
    """Steps between checkpoints; the last step always makes one, and so does SIGTERM or Ctrl-C."""
    checkpoint_minutes: float | None = field(default=None, metadata=MAY_CHANGE)
    """Minutes after which a checkpoint is made in any case."""
    keep_last: int | None = field(default=3, metadata=MAY_CHANGE)
    """Checkpoints that are kept, newest first; none is deleted without a number."""
    keep_best: str | None = field(default=None, metadata=MAY_CHANGE)
    """Name of a metric: the checkpoint where it was highest is kept too."""
    mirror: str | None = field(default=None, metadata=MAY_CHANGE)
    """Any fsspec URL (s3://bucket/run): checkpoints and logs are copied there, and fetched from there when the run's
    folder is empty."""
    evaluate_every: int | None = field(default=None, metadata=MAY_CHANGE)
    """Steps between evaluations; the last step always makes one."""
    log: tuple[Sink, ...] = field(default=(), metadata=MAY_CHANGE)
    """Where numbers go besides metrics.jsonl: tensorboard, wandb (extras of the same names)."""

    def __post_init__(self) -> None:
        require_finite(self)
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise UsageError(f"steps {self.steps} and epochs {self.epochs} must be above 0")
        _require_positive(self, "timeout", "checkpoint_minutes")
        for name in ("checkpoint_every", "keep_last", "micro_batch_size", "extend_to", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Fine-tuning: what training starts from instead of random weights, and how much of it may change."""

    lock: Lock = "none"
    """A tower that keeps its weights: `image` is locked-image tuning (LiT, Zhai et al. 2022), `text` the reverse."""
    cache_features: CacheFeatures = field(default="auto", metadata=MAY_CHANGE)
    """Whether the locked tower sees every sample once, before training, and what it made of it is kept on disk. auto:
    where that gives the same and saves time (its input is not augmented, the data is passed more than once, and lies
    on this machine)."""
    feature_cache: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder for them; by default in the user's cache folder."""
    feature_type: FeatureType = "float32"
    """How they are kept: float16 takes half the disk, and rounds."""
    lora_rank: int | None = None
    """Train low-rank additions of this rank to every Linear of the unlocked towers (LoRA, Hu et al. 2021), and the
    temperature, instead of the weights; needs `diptych[lora]`."""
    lora_alpha: float | None = None
    """The additions count alpha / rank; by default alpha is the rank."""
    layer_decay: float = 1.0
    """Each layer further from the output learns at this share of the rate of the one above it; 1: all at the same."""
    stop_when_lost: float | None = field(default=None, metadata=MAY_CHANGE)
    """Stop with a checkpoint (exit status 3) when a share of any evaluation is more than so many points below what the
    model had at the start."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""

    def __post_init__(self) -> None:
        require_finite(self)
        if self.lock not in ("none", "image", "text"):
            raise unknown_name("lock", str(self.lock), ("none", "image", "text"))
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UsageError(f"lora_rank {self.lora_rank} must be at least 1; 8 is usual")
        if self.lora_alpha is not None and (self.lora_rank is None or self.lora_alpha <= 0):
            raise UsageError(f"lora_alpha {self.lora_alpha} must be above 0, and needs --lora-rank; add --lora-rank 8")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay {self.layer_decay} is not a share in (0, 1]; 1 is the same rate for all")
        if self.stop_when_lost is not None and self.stop_when_lost < 0:
            raise UsageError(f"stop_when_lost {self.stop_when_lost} is not a number of points; use 0 or more")
        if self.cache_features == "on" and self.lock == "none":
            raise UsageError("cache_features on needs a tower that does not change; add --lock image or --lock text")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: CLIPConfig
    """The towers; see `diptych.model.config.PRESETS`."""
    data: tuple[SourceConfig, ...]
    """Folders of shards, and how often each is seen."""
    out: Path = field(metadata=MAY_CHANGE)
    """The run's folder: checkpoints, logs, config. An unfinished run in it is continued."""
    tokenizer: Path | None = None
    """Folder of a tokenizer of one's own; by default OpenAI's vocabulary."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How pairs become batches."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss and its regularisation."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """How long, how exactly, on what, and what is kept."""
    start_model: str | None = None
    """The model that is fine-tuned: anything that `diptych.load` opens. Without it weights are random at the start."""
    start: StartConfig = field(default_factory=StartConfig)
    """How much of it may change."""

    def __post_init__(self) -> None:
        if self.start_model is None and self.start != StartConfig():
            raise UsageError("lock, LoRA, layer decay and the guard belong to fine-tuning; name a start_model")
        self._check_start()
        if self.model.logit_bias != (self.loss.loss == "siglip"):
            has = "has" if self.model.logit_bias else "has no"
            raise UsageError(f"the model {has} logit_bias, which does not fit the loss {self.loss.loss}")
        if self.loss.patch_dropout and not isinstance(self.model.vision, ViTConfig):
            raise UsageError("patch_dropout needs a ViT image tower of our own, whose patches can be left out")

    def _check_start(self) -> None:
        start = self.start
        if start.lora_rank is not None and self.run.sharding == "fsdp":
            raise UsageError("LoRA trains so few weights that there is nothing to cut; use --sharding ddp")
        if start.lock == "image" and self.loss.patch_dropout:
            raise UsageError("a locked image tower learns nothing from dropped patches; use --patch-dropout 0")
        if start.lock == "image" and start.cache_features == "on" and self.loader.augment:
            raise UsageError(
                "cache_features on needs pictures that are the same at every pass, and they are cropped at random; "
                "add --no-augment, or use --cache-features auto"
            )
