"""Settings of `diptych evaluate`: frozen values, no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError, unknown_name
from diptych.evaluate.results import PROTOCOLS, Protocol
from diptych.model.config import PRECISIONS, Activation, Precision

ProfileName = Literal["paper", "clip_benchmark"]
PROFILES: tuple[ProfileName, ...] = ("paper", "clip_benchmark")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Models, datasets, protocols and how they are measured."""

    models: tuple[str, ...]
    """Runs' folders, checkpoints of any layout, hf-hub:owner/name, published names; NAME=SOURCE gives one a name."""
    suite: tuple[str, ...] = ("paper27",)
    """Suites (paper27, kornblith12, shifts, retrieval, clip_benchmark, made), datasets by id, or one's own: folders,
    tables, and TOML files that describe them."""
    out: Path = Path("results")
    """The results folder: new, or one to go on with."""
    data: Path = Path("data")
    """Where the datasets lie: a folder for each, by its id or by the name of its repository."""
    protocols: tuple[Protocol, ...] = ()
    """Protocols, each for the datasets of its kinds; by default zeroshot, retrieval or temporal, by kind of dataset."""
    profile: ProfileName = "paper"
    """Whose class names, templates, splits and metric: the paper's or CLIP_benchmark's."""
    precision: Precision = "exact"
    """Precision of the towers: exact, float32, bfloat16, int8 (image tower only); auto: bfloat16 where it is fast."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    preset: str | None = None
    """Architecture of a bare file whose shapes do not tell the number of heads."""
    turn: bool = False
    """Turn pictures as their EXIF orientation says; OpenAI's preprocessing leaves them as they are stored."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    batch_size: int = 64
    """Pictures that go through the tower at once."""
    download: bool = False
    """Fetch datasets that are not there, from the repositories that the registry names; ImageNet is 6 GB."""
    redo: bool = False
    """Compute results again that are there with other settings (data, model, seed, ...), else that is an error."""
    on_mismatch: Literal["stop", "warn"] = "stop"
    """A dataset that does not match the registry (counts, empty classes): refuse it, or evaluate it with a warning."""
    cache: Path | None = None
    """Folder of computed image features; by default `.features` in the results folder."""
    cache_bytes: int = 32 << 30
    """How large that folder may grow."""
    overlap: Path | None = None
    """overlap.parquet of `diptych curate contamination`, for the protocol overlap: one dataset at a time."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Images a class for the protocol fewshot."""
    seeds: int = 10
    """Random draws for the protocol fewshot."""
    seed: int = 0
    """Seed of every draw: bootstrap, prompt search, validation sets, shots."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("no model was named; give --model at least once")
        if not self.suite:
            raise UsageError(
                "no suite was named; give --suite paper27, a dataset's id, or a folder or TOML of your own"
            )
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise unknown_name("protocol", protocol, PROTOCOLS)
            if protocol == "bias":
                raise UsageError("the protocol bias asks about a table of faces; use python -m recipes.faces for it")
        if self.profile not in PROFILES:
            raise unknown_name("profile", self.profile, PROFILES)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if not self.shots:
            raise UsageError("no shots were named; give --shots 1 2 4 8 16, or leave it out")
        for name, value in (
            ("batch_size", self.batch_size),
            ("seeds", self.seeds),
            *(("shots", n) for n in self.shots),
        ):
            if value < 1:
                raise UsageError(f"{name} {value} must be at least 1")
        if ("overlap" in self.protocols) != (self.overlap is not None):
            raise UsageError("the protocol overlap and --overlap overlap.parquet belong together; give both or neither")
