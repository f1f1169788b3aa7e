"""How shards become batches: frozen values, no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from diptych.config import MAY_CHANGE
from diptych.errors import UsageError

MAX_WEIGHT = 1_000_000
"""Times that an epoch may see each sample."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of shards, one tar, or a range or glob of them: at a path of this machine, or at a URL."""

    path: Path | None = None
    """Where it lies."""
    url: str | None = None
    """Where it lies elsewhere: any fsspec URL of a folder, a tar, or a range like https://host/{00000..00099}.tar."""
    weight: float = 1.0
    """How many times an epoch each of its samples is seen."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise UsageError(f"a source needs a path or a url, not {self.path} and {self.url}")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise UsageError(
                f"weight {self.weight} of {self.path or self.url} must be above 0 and at most {MAX_WEIGHT:,}; "
                "leave a source out that is not to be seen"
            )

    @classmethod
    def parse(cls, text: str) -> "SourceConfig":
        """Read `PATH` or `URL`, with `@WEIGHT` behind it or not."""
        place, at, weight = text.rpartition("@")
        if not at or (_is_url(text) and not _is_number(weight)):  # a URL may name a user: s3://user@bucket
            place, weight = text, "1"
        if not _is_number(weight):
            raise UsageError(f"{text!r} is not PATH or PATH@WEIGHT, for example shards/photos@0.5")
        if _is_url(place):
            return cls(url=place.rstrip("/"), weight=float(weight))
        return cls(path=Path(place), weight=float(weight))


def _is_url(text: str) -> bool:
    return "://" in text


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How pairs become batches."""

    batch_size: int = field(default=256, metadata=MAY_CHANGE)
    """Pairs in the global batch, over all ranks."""
    seed: int = 0
    """Seed of the sample order and the crops."""
    min_crop: float = 0.9
    """Side of the random square crop: uniform between this share of the shorter side and all of it."""
    caption_key: str | None = None
    """Name in the samples' JSON of the caption, or of a list of several, of which every visit draws one; by default the
    caption is the .txt beside the picture, or `caption` in its JSON."""
    augment: bool = True
    """Random crops. Without, a picture is prepared as it is when the model is used, the same at every pass."""
    workers: int = field(default=1, metadata=MAY_CHANGE)
    """Threads that read, decode and tokenize ahead; 0 does it in between the steps."""
    prefetch: int = field(default=4, metadata=MAY_CHANGE)
    """Batches kept ready; fewer if they would take more than 2 GiB."""
    strict: bool = False
    """Stop at the first sample that cannot be used, instead of counting it and going on."""
    cache: Path | None = field(default=None, metadata=MAY_CHANGE)
    """Folder for shards that lie elsewhere while they are read; by default in the user's cache folder."""
    cache_bytes: int = field(default=64 << 30, metadata=MAY_CHANGE)
    """Bytes that it may take: at least one block of 64 shards, better two; more only if batches under way need it."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise UsageError(f"batch_size {self.batch_size} leaves nothing to contrast with; use at least 2")
        if not 0 < self.min_crop <= 1:
            raise UsageError(f"min_crop {self.min_crop} is not a share in (0, 1]")
        if self.cache_bytes < 1:
            raise UsageError(f"cache_bytes {self.cache_bytes} must be at least 1")
        if self.workers < 0 or self.prefetch < 1:
            raise UsageError(f"workers {self.workers} must be 0 or more, prefetch {self.prefetch} 1 or more")
