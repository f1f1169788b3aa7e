"""How what people have becomes shards: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How sources of pairs are read."""

    image_column: str | None = None
    """Column of a table that holds the pictures or their paths. Needed only where there is more than one choice."""
    caption_column: tuple[str, ...] = ()
    """Column of captions, or several; all captions of a picture are kept. Needed only where there is a choice."""
    caption_key: str | None = None
    """Name of the caption, or of a list of them, in the JSON of a tar's samples; by default the .txt or `caption`."""
    images: Path | None = None
    """Folder that paths in tables and annotations are relative to; by default where the table lies."""
    lines: bool = False
    """Take each line of a .txt for a caption of its own."""
    split: str | None = None
    """Split of a dataset that has several; by default train."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Sources of pairs -> shards."""

    sources: tuple[str, ...]
    """What is read."""
    out: Path
    """Folder for the shards."""
    read: ReadConfig = ReadConfig()
    samples_per_shard: int = 1000
    """Samples of a shard, at most."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UsageError(f"samples_per_shard {self.samples_per_shard} must be 1 or more; leave it out for 1000")
