"""How pairs become shards, how samples are deleted: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Fetched pairs -> shards, in an order of their own."""

    folder: Path
    """Folder of pairs with their pictures."""
    out: Path
    """Folder for the shards."""
    queries: Path | None = None
    """The list of queries that the pairs were matched with, so that each sample names its queries."""
    samples_per_shard: int = 1000
    """Samples of each shard but the last."""
    shards_per_task: int = 4
    """Shards that a process makes at once; their pictures have to fit in its memory."""
    seed: int = 0
    """Of the order, which does not depend on where a pair came from."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.shards_per_task < 1:
            raise UsageError(
                f"samples_per_shard {self.samples_per_shard} and shards_per_task {self.shards_per_task} must be 1 or "
                "more; leave them out for 1000 and 4"
            )


@dataclass(frozen=True, kw_only=True)
class DeleteConfig:
    """Which samples leave a dataset."""

    shards: Path
    """Folder of shards."""
    key: tuple[str, ...] = ()
    """Keys of samples."""
    url: tuple[str, ...] = ()
    """Addresses of pictures or of pages; a page takes all pictures found on it along."""
    file: Path | None = None
    """A file with a key or an address on each line."""
    compact: bool = False
    """Write the shards that are concerned anew, without the bytes of what was deleted, now or before. This makes it
    another dataset: a training run that is under way cannot go on with it."""

    def __post_init__(self) -> None:
        if not (self.key or self.url or self.file or self.compact):
            raise UsageError("nothing to delete was named; give --key, --url, --from FILE or --compact")
