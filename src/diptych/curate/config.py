"""How stages are run, how pairs become shards, how samples are deleted: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """From web pages to shards in one work folder."""

    work: Path
    """Folder for all stages; a run that was stopped goes on there."""
    inputs: tuple[str, ...]
    """WARC, WAT and HTML files (gzipped or not), folders or `.paths` lists of them; paths or fsspec URLs."""
    queries: Path
    """The list of queries: queries.parquet or its folder; `diptych curate queries` makes one."""
    contact: str
    """Web page or e-mail address of who runs this; every request for a picture names it."""
    policy: Literal["cap", "metaclip", "assign"] = "cap"
    """How pairs of common queries are thinned out; see `diptych curate balance`."""
    limit: int = 20_000
    """Pairs a query; 20,000 in the paper."""
    seed: int = 0
    """Seed of every random choice."""
    allow_host: tuple[str, ...] = ()
    """host:port of this machine that may be asked although its address is not public, for example 127.0.0.1:8000."""
    settings: Path | None = None
    """A TOML file with a table for each stage ([crawl], [filter], [distinct], [match], [balance], [fetch], [pictures],
    [write]): any of its options, with _ for -."""


@dataclass(frozen=True, kw_only=True)
class LinksConfig:
    """Lists of addresses with captions (LAION, DataComp, CC12M, COYO, ...) -> candidates."""

    inputs: tuple[str, ...]
    """Parquet, CSV, TSV or lines of JSON: files, globs, ranges, or a folder of Parquet files."""
    out: Path
    """Folder for the candidates."""
    url_column: str | None = None
    """Column of the addresses of pictures. Needed only where there is more than one choice."""
    caption_column: tuple[str, ...] = ()
    """Column of captions, or several; each caption is a candidate. Needed only where there is a choice."""
    hash_column: str | None = None
    """Column of hashes of the pictures' files (MD5, SHA-256 or SHA-512 in hexadecimal): `fetch` drops a picture that
    has become another."""
    rows_per_task: int = 50_000
    """Rows of a part, at most."""

    def __post_init__(self) -> None:
        if self.rows_per_task < 1:
            raise UsageError(f"rows_per_task {self.rows_per_task} must be 1 or more; leave it out for 50,000")


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
    """Seed of the order, which does not depend on where a pair came from."""

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
