"""How a folder of features is made: frozen values, no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError, unknown_name
from diptych.model.config import PRECISIONS, Activation, Precision
from diptych.stage.config import EngineKind

Format = Literal["parquet", "arrow", "npy"]
FORMATS: tuple[Format, ...] = ("parquet", "arrow", "npy")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    format: Format = "parquet"
    """Format of each part: Parquet, Arrow (can be memory-mapped), or .npy beside its ids in JSON lines."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers."""
    part_rows: int = 2000
    """Inputs in a part: a part is done or it is not, so a kill costs at most the ones under way."""

    def __post_init__(self) -> None:
        if self.part_rows < 1:
            raise UsageError(f"part_rows {self.part_rows} must be at least 1")
        if self.format not in FORMATS:
            raise unknown_name("format", self.format, FORMATS)


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """How it is computed, and where."""

    kind: Literal["auto", "image", "text"] = "auto"
    """What columns of text and shards stand for: auto takes a column of text for paths if all the first ones end like
    pictures, else for captions; shards for their pictures."""
    precision: Precision = "auto"
    """Precision of the towers: exact, float32, bfloat16, int8 (image tower only); auto: bfloat16 where the
    device multiplies it fast, else float32. All but exact preprocess quickly."""
    turn: bool = False
    """Turn pictures as their EXIF orientation says; OpenAI's preprocessing leaves them as they are stored."""
    batch_size: int = 32
    """Pictures that go through the tower at once."""
    threads: int | None = None
    """That decode, and on a CPU as many again that compute, each a batch of its own; by default one a core."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    engine: EngineKind = "local"
    """`ray`: on all machines of a Ray cluster (RAY_ADDRESS), which need --out and the inputs at the same paths."""
    actors: int | None = None
    """Ray actors, each with a model of its own; by default one a GPU, or one a machine where there is none."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        for name, value in (("batch_size", self.batch_size), ("threads", self.threads), ("actors", self.actors)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Everything that a folder of features is made of."""

    model: str
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name."""
    inputs: tuple[str, ...]
    """Folders, globs, pictures, shards, `file.parquet:column`, text files."""
    out: Path
    """The folder."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    output: OutputConfig = field(default_factory=OutputConfig)
    work: WorkConfig = field(default_factory=WorkConfig)
