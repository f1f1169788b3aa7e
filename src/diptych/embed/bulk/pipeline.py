"""A range of parts from rows to features: read and decode in threads, compute in others, a bounded number ahead.

A batch never reaches over the end of a part, and is filled with the rows that can be used, in order. So what a part
holds depends on its rows alone, not on who computes it, what was done before or how quick the threads are.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from diptych.checkpoint.layouts import load
from diptych.checkpoint.loaded import Loaded
from diptych.embed.bulk.config import EmbedConfig
from diptych.embed.bulk.folder import FeatureFolder, Part
from diptych.embed.images import ImageTower
from diptych.embed.sources import Row, Source, fetch
from diptych.embed.stream import compute_ahead, count_cores, use_one_thread
from diptych.embed.texts import embed_texts
from diptych.errors import PictureError
from diptych.model.config import Precision
from diptych.model.device import choose_device
from diptych.prefetch import map_ahead

TEXT_BATCH = 512
"""Texts that are handed over at once."""


@dataclass
class _Batch:
    part: Part
    contents: list[Any] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    features: Float[np.ndarray, "N E"] | None = None
    ends_part: bool = False

    @property
    def rows(self) -> int:
        return len(self.ids) + len(self.skipped)


@dataclass(frozen=True)
class PartResult:
    """A part that is computed."""

    part: Part
    ids: list[str]
    features: Float[np.ndarray, "N E"]
    skipped: list[tuple[str, str]]


class Pipeline:
    """A model, ready to compute parts."""

    def __init__(self, loaded: Loaded, tower: ImageTower, batch_size: int, threads: int | None = None) -> None:
        self.loaded, self.tower = loaded, tower
        self.precision: Precision = tower.precision
        self.batch_size = batch_size
        self.threads = threads or count_cores()
        self.streams = self.threads if tower.device.type == "cpu" else 1

    def run(
        self, sources: Sequence[Source], parts: Sequence[Part], on_rows: Callable[[int, int], None] | None = None
    ) -> Generator[PartResult]:
        """Compute parts, in order. `on_rows(done, left out)` is told of every batch."""
        contents = map_ahead(
            self._read,
            _iter_rows(sources, parts),
            threads=self.threads,
            ahead=(self.streams + 2) * self.batch_size,
            prepare=use_one_thread,
        )
        sizes = {"image": self.batch_size, "text": TEXT_BATCH}
        batches = compute_ahead(
            self._encode, _fill(contents, parts, [sizes[source.kind] for source in sources]), self.streams
        )
        done: list[_Batch] = []
        try:
            for batch in batches:
                done.append(batch)
                if on_rows is not None:
                    on_rows(len(batch.ids), len(batch.skipped))
                if batch.ends_part:
                    yield self._join(done)
                    done = []
        finally:
            batches.close()
            contents.close()

    def _read(self, row: Row) -> tuple[str, Any]:
        """The id and what the model takes, or why there is nothing."""
        try:
            data = fetch(row)
            return row.id, data if isinstance(data, str) else torch.from_numpy(self.tower.read(data))
        except PictureError as error:
            return row.id, error

    def _encode(self, batch: _Batch) -> _Batch:
        if batch.contents:
            if isinstance(batch.contents[0], str):
                features = embed_texts(self.loaded, batch.contents, precision=self.precision)
            else:
                features = self.tower.encode(torch.stack(batch.contents))
            batch.features = features.numpy()
            batch.contents = []
        return batch

    def _join(self, batches: list[_Batch]) -> PartResult:
        features = [batch.features for batch in batches if batch.features is not None]
        return PartResult(
            batches[0].part,
            [row_id for batch in batches for row_id in batch.ids],
            np.concatenate([np.empty((0, self.tower.embed_dim), np.float32), *features]),
            [entry for batch in batches for entry in batch.skipped],
        )


def iter_contiguous_parts(parts: Sequence[Part], most: int | None = None) -> Iterator[tuple[Part, ...]]:
    """Put parts together that are neighbours in one source, at most so many: what is read in one go."""
    for _, group in itertools.groupby(enumerate(parts), lambda pair: (pair[1].source, pair[1].number - pair[0])):
        run_of = [part for _, part in group]
        size = most or len(run_of)
        for start in range(0, len(run_of), size):
            yield tuple(run_of[start : start + size])


def _iter_rows(sources: Sequence[Source], parts: Sequence[Part]) -> Iterator[Row]:
    for stretch in iter_contiguous_parts(parts):
        yield from sources[stretch[0].source].read(stretch[0].start, stretch[-1].stop)


def _fill(contents: Iterator[tuple[str, Any]], parts: Sequence[Part], sizes: Sequence[int]) -> Iterator[_Batch]:
    """Batches of usable rows; each names the rows that were left out on the way to it."""
    for part in parts:
        batch = _Batch(part)
        for _ in range(part.stop - part.start):
            row_id, content = next(contents)
            if isinstance(content, PictureError):
                batch.skipped.append((row_id, content.reason))
                continue
            if len(batch.contents) == sizes[part.source]:
                yield batch
                batch = _Batch(part)
            batch.ids.append(row_id)
            batch.contents.append(content)
        batch.ends_part = True
        yield batch


def compute_parts(
    pipeline: Pipeline,
    folder: FeatureFolder,
    sources: Sequence[Source],
    parts: Sequence[Part],
    on_rows: Callable[[int, int], None] | None = None,
) -> None:
    """Compute parts and write each as soon as it is complete."""
    with contextlib.closing(pipeline.run(sources, parts, on_rows)) as results:
        for result in results:
            name = sources[result.part.source].name
            folder.write_part(result.part, name, result.ids, result.features, result.skipped)


def open_pipeline(config: EmbedConfig) -> Pipeline:
    """Load the model, on the device that is asked for, and make it ready."""
    work = config.work
    loaded = load(config.model, device=choose_device(work.device), activation=config.activation, preset=config.preset)
    return Pipeline(loaded, ImageTower(loaded, work.precision), work.batch_size, work.threads)
