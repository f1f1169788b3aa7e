"""Small stages that tests run in real processes."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from diptych.curate.rows import BALANCED, CANDIDATES, key_of, with_reason
from diptych.pair import Pair, to_batch
from diptych.stage.run import Engine, Task, part_name


@dataclass(frozen=True)
class Page:
    """Makes pairs of a file's name: every third is dropped."""

    pairs: int = 40

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path in batch.column("path").to_pylist():
                name = Path(path).name
                urls = [f"http://example.org/{name}/{i}.jpg" for i in range(self.pairs)]
                pairs = [
                    Pair(key=key_of(url, f"a {name} {i}"), caption=f"a {name} {i}", image_url=url, page_url="http://p/")
                    for i, url in enumerate(urls)
                ]
                yield with_reason(to_batch(pairs), [None if i % 3 else "third" for i in range(self.pairs)])


@dataclass(frozen=True)
class Half:
    """Keeps the pairs whose key begins with a digit; may be slow, and may die."""

    seconds: float = 0.0
    """A batch takes."""
    die_once: str = ""
    """A file that is made by the process that dies."""
    die_at: str = ""
    """A text: whoever meets it in a caption dies."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            time.sleep(self.seconds)
            if self.die_once and not os.path.exists(self.die_once):
                Path(self.die_once).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.die_at and any(self.die_at in caption for caption in batch.column("caption").to_pylist()):
                os.kill(os.getpid(), signal.SIGKILL)
            yield with_reason(
                batch, [None if key[0].isdigit() else "letter" for key in batch.column("key").to_pylist()]
            )


@dataclass(frozen=True)
class Paint:
    """Gives every pair a picture (its caption behind a PNG's first bytes is enough for a shard), a query and a draw."""

    picture: bytes = b"\x89PNG\r\n\x1a\n"

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = batch.to_pylist()
            for i, row in enumerate(rows):
                row |= {
                    "image": self.picture + row["caption"].encode() + b".",
                    "queries": [0, 1],
                    "query": 1,
                    "draw": i / 64,
                }
            yield with_reason(pa.RecordBatch.from_pylist(rows, schema=BALANCED), [None] * len(rows))


def crawl(work: Path, files: int = 5, **options) -> str:
    """Fill work/crawl; returns its hash."""
    inputs = work / "inputs"
    inputs.mkdir(exist_ok=True)
    for i in range(files):
        (inputs / f"page{i}").write_text("x")
    tasks = [Task(part_name(i), (path,), rows=False) for i, path in enumerate(sorted(inputs.iterdir()))]
    return Engine(**options).run_stage(Page(), tasks, work / "crawl", {"pairs": 40}, schema=CANDIDATES).hash
