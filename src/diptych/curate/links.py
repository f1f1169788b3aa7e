"""Lists of addresses with captions -> candidates, as `crawl` makes them of pages: what filters and fetching go on with.

LAION, DataComp, CC3M, CC12M and COYO are such lists. They are read as the tables of `diptych shards build` are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from diptych.collect.config import ReadConfig
from diptych.collect.inputs import open_sources
from diptych.collect.sources import AnySource, Sample, TarPairs
from diptych.curate.config import LinksConfig
from diptych.curate.rows import CANDIDATES, EXPECTED_HASH, key_of, outcome
from diptych.embed.sources import Part
from diptych.errors import UsageError
from diptych.pair import format_details
from diptych.stage.run import Engine, StageReport, part_name

_SCHEMA = outcome(CANDIDATES)
_BATCH_ROWS = 4096
_HASH = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{64}|[0-9a-fA-F]{128}")


@dataclass(frozen=True)
class Piece(Part):
    """A piece of a list."""

    def read(self) -> Iterator[pa.RecordBatch]:
        """Which list, and which of its rows."""
        yield pa.record_batch({"source": [self.source], "start": [self.start], "stop": [self.stop]})


@dataclass(frozen=True, kw_only=True)
class Links:
    """Stage: pieces of lists in, candidates out."""

    sources: tuple[AnySource, ...]
    hash_column: str | None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Read piece after piece."""
        for batch in batches:
            for piece in batch.to_pylist():
                source, rows = self.sources[piece["source"]], list[dict[str, Any]]()
                for sample in source.read(piece["start"], piece["stop"]):
                    rows += self._make_rows(sample)
                    if len(rows) >= _BATCH_ROWS:
                        yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
                        rows = []
                yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)

    def _make_rows(self, sample: Sample) -> Iterator[dict[str, Any]]:
        """A candidate for each caption, or one row with the reason why there is none."""
        url, reason = sample.row.id, sample.row.reason
        if reason == "url":  # an address, which is what is wanted
            reason = "" if url.startswith(("http://", "https://")) else "url_scheme"
        elif reason in ("", "outside_folder", "null", "no_image"):
            reason = "url_invalid"
        details = dict(sample.details)
        page = details.pop("page_url", None)
        if self.hash_column is not None:
            expected = details.pop(self.hash_column, None)
            if isinstance(expected, str) and _HASH.fullmatch(expected):
                details[EXPECTED_HASH] = expected.lower()
        details = {name: value for name, value in details.items() if value != url}
        for caption in sample.captions or ("",):
            yield {
                "key": key_of(url, caption),
                "caption": caption,
                "image": None,
                "image_url": url if "://" in url else None,
                "page_url": page if isinstance(page, str) else None,
                "details": format_details(details).encode("utf-8", "replace").decode(),
                "reason": reason or (None if caption else "no_caption"),
            }


def open_lists(config: LinksConfig) -> list[AnySource]:
    """Find the lists and what their columns are; UsageError for what is none."""
    read = ReadConfig(image_column=config.url_column, caption_column=config.caption_column)
    sources = open_sources(config.inputs, read, config.rows_per_task, links=True)
    for source in sources:
        if isinstance(source, TarPairs):
            raise UsageError(f"{source.name} is a tar, not a list of addresses")
    return sources


def run(config: LinksConfig, sources: Sequence[AnySource], *, engine: Engine) -> StageReport:
    """Make candidates of all lists."""
    pieces = [(number, *piece) for number, source in enumerate(sources) for piece in source.ranges]
    tasks = [
        Piece(part_name(i), (sources[number].name,), rows=False, source=number, start=start, stop=stop)
        for i, (number, start, stop) in enumerate(pieces)
    ]
    decides: Mapping[str, Any] = {
        "inputs": [source.fingerprint for source in sources],
        "hash_column": config.hash_column,
        "rows_per_task": config.rows_per_task,
    }
    stage = Links(sources=tuple(sources), hash_column=config.hash_column)
    return engine.run_stage(stage, tasks, config.out, decides, schema=CANDIDATES)
