"""What `diptych embed` does, as a job of `diptych.stage`: parts of sources to files of features.

    manifest.json            model, settings and inputs, written first; counts and files, once everything is done
    features/00000.parquet   id, source, feature of the rows of one part (or .arrow, or .npy with .ids.jsonl)
    dropped/00000.jsonl      source, id and reason of those that were left out, if any were
    done/00000.json          written last: the part is done; counts, SHA-256 of its files
    skipped.jsonl            what was left out of all parts, once everything is done

Parts are ranges of the inputs and so the same whoever computes them. A batch never reaches over the end of a part: what
a part holds depends on its rows alone, not on who computes it, what was done before or how quick the threads are.
"""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from diptych import files
from diptych.checkpoint.layouts import load
from diptych.checkpoint.loaded import Loaded
from diptych.embed.bulk.config import EmbedConfig
from diptych.embed.bulk.folder import STAGE, write_features
from diptych.embed.images import ImageTower, require_finite
from diptych.embed.sources import Row, Source, fetch
from diptych.embed.stream import Encoder, ImageEncoder, encode_stream
from diptych.embed.texts import TextEncoder
from diptych.errors import PASSING, PictureError, UsageError
from diptych.model.device import choose_device
from diptych.stage.folder import TaskRecord, find_difference, fingerprint
from diptych.stage.job import Job, Task

TEXT_BATCH = 512
"""Texts that are handed over at once."""


@dataclass(frozen=True)
class Part(Task):
    """Rows [start, stop) of one source."""

    source: int = 0
    start: int = 0
    stop: int = 0


def plan_parts(sources: Sequence[Source], part_rows: int) -> list[Part]:
    """Cut every source into ranges of at most `part_rows`."""
    ranges = [
        (number, start, min(start + part_rows, source.rows))
        for number, source in enumerate(sources)
        for start in range(0, source.rows, part_rows)
    ]
    return [
        Part(f"{i:05d}", (sources[number].name,), source=number, start=start, stop=stop)
        for i, (number, start, stop) in enumerate(ranges)
    ]


def iter_contiguous_parts(parts: Iterable[Part], most: int | None = None) -> Iterator[list[Part]]:
    """Put parts together that are neighbours in one source, at most so many: what is read in one go."""
    together: list[Part] = []
    for part in parts:
        if together and (
            len(together) == most or (part.source, part.start) != (together[-1].source, together[-1].stop)
        ):
            yield together
            together = []
        together.append(part)
    if together:
        yield together


def open_model(config: EmbedConfig) -> Loaded:
    """Load the model, on the device that is asked for."""
    device = choose_device(config.work.device)
    loaded = load(config.model, device=device, activation=config.activation, preset=config.preset)
    return loaded.turned() if config.work.turn else loaded


@dataclass(frozen=True, kw_only=True)
class EmbedJob(Job):
    """Computes and writes parts. In another process it opens the model itself."""

    config: EmbedConfig
    """With the precision that is meant, not `auto`."""
    sources: tuple[Source, ...]
    model: Loaded | None = None
    """The model, if it is open."""
    on_row: Callable[[bool], None] | None = None
    """Told of every row whether it was left out."""
    on_cut: Callable[[int], None] | None = None
    """Told how many texts were longer than the model reads."""

    REMEDY: ClassVar[str] = "name a new folder as --out, or do what was done then"
    LIGHTER: ClassVar[str] = "Use a smaller --batch-size or fewer --threads"

    @property
    def stage(self) -> str:
        """The name of all folders of features, wherever they are."""
        return STAGE

    @cached_property
    def loaded(self) -> Loaded:
        """The model, opened once in a process."""
        return self.model or open_model(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of what features depend on."""
        return fingerprint(self.stage, _choose_deciding(self.settings), self.parent)

    def find_difference(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """What a folder was begun with and is not run with now: inputs, model, settings."""
        here = _choose_deciding(now["config"])
        try:
            there = _choose_deciding(then["config"])
            if different := _find_other_inputs(there["inputs"], here["inputs"]):
                return f"other inputs: {different}"
            for section, words in (("model", "another model"), ("settings", "other settings")):
                if different := find_difference(there[section], here[section]):
                    return f"{words}: {different}"
        except (KeyError, TypeError, AttributeError, ValueError):
            return "something that its manifest.json does not say any more: it is damaged"
        return None

    def is_final(self, record: TaskRecord) -> bool:
        """A fault of the machine leaves out an input that can be read another time."""
        return not any(reason in PASSING for reason in record.dropped)

    def __call__(self, tasks: Sequence[Task]) -> Generator[TaskRecord]:
        """Compute parts in order, while later ones are read, and commit each as soon as it is complete."""
        (self.folder / "features").mkdir(exist_ok=True)
        for kind, parts in groupby(cast(Sequence[Part], tasks), lambda part: self.sources[part.source].kind):
            loaded, work = self.loaded, self.config.work
            tower = ImageTower(loaded, work.precision) if kind == "image" else None
            encoder = ImageEncoder(tower) if tower else TextEncoder(loaded, work.precision, self.on_cut)
            stream = encode_stream(
                _Fetching(encoder, self._count_streams(encoder)),
                self._iter_rows(parts),
                batch_size=self.config.work.batch_size if kind == "image" else TEXT_BATCH,
                group=itemgetter(0),
                threads=self.config.work.threads,
                together=False,
            )
            with closing(stream):
                for part, outcomes in groupby(stream, lambda outcome: outcome[0][0]):
                    yield self._write(part, outcomes)
            if tower:
                tower.warn()

    def _count_streams(self, encoder: Encoder) -> int:
        threads, on_cpu = self.config.work.threads, self.loaded.model.logit_scale.device.type == "cpu"
        return threads if threads and on_cpu else encoder.streams

    def _iter_rows(self, parts: Iterable[Part]) -> Iterator[tuple[tuple[Part, str], Row]]:
        for some in iter_contiguous_parts(parts):
            source = self.sources[some[0].source]
            rows = source.read(some[0].start, some[-1].stop)
            for part in some:
                for _ in range(part.stop - part.start):
                    row = next(rows, None)
                    if row is None:
                        raise UsageError(f"{source.name} lost rows after it was listed; begin again in another --out")
                    yield (part, row.id), row

    def _write(self, part: Part, outcomes: Iterable[tuple[tuple[Part, str], Tensor | PictureError]]) -> TaskRecord:
        """Write features and reasons of a part, then its record."""
        source = self.sources[part.source].name
        ids: list[str] = []
        features: list[Tensor] = []
        dropped = list[tuple[str, str]]()
        for (_, row_id), outcome in outcomes:
            if isinstance(outcome, PictureError):
                dropped.append((row_id, outcome.reason))
            else:
                ids.append(row_id)
                features.append(outcome)
            if self.on_row is not None:
                self.on_row(isinstance(outcome, PictureError))
        empty = torch.empty(0, self.loaded.model.config.embed_dim)
        array = require_finite(torch.stack(features) if features else empty).numpy().astype(self.config.output.dtype)
        names = write_features(self.folder / "features", part.name, self.config.output.format, source, ids, array)
        written = {f"features/{name}" for name in names}
        if dropped:
            written.add(name := f"dropped/{part.name}.jsonl")
            files.write_bytes(self.folder / name, format_dropped(source, dropped))
        return self.commit(
            part,
            kept=len(ids),
            dropped=Counter(reason for _, reason in dropped),
            written={name: files.sha256(self.folder / name) for name in sorted(written)},
        )


class _Fetching:
    """An encoder of rows: what a row stands for is fetched in the threads that read."""

    def __init__(self, encoder: Encoder, streams: int) -> None:
        self.encode, self._read, self.streams = encoder.encode, encoder.read, streams

    def read(self, row: Row, /) -> Any:
        return self._read(fetch(row))


def format_dropped(source: str, dropped: Iterable[tuple[str, str]]) -> bytes:
    """Lines of JSON that name what was left out and why."""
    entries = ({"source": source, "id": row_id, "reason": reason} for row_id, reason in dropped)
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def _choose_deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What features depend on: not where the model lies, nor other files beside the inputs."""
    model = {name: value for name, value in settings["model"].items() if name != "source"}
    inputs = [{name: entry[name] for name in ("source", "kind", "rows", "fingerprint")} for entry in settings["inputs"]]
    return {"model": model, "settings": settings["settings"], "inputs": inputs}


def _find_other_inputs(there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]) -> str | None:
    then, now = ({entry["source"]: entry for entry in one} for one in (there, here))
    if list(then) != list(now):
        return f"{_list(then)}, not {_list(now)}"
    for name, entry in now.items():
        if entry != then[name]:
            return f"{name} has changed since (rows then {then[name]['rows']:,}, now {entry['rows']:,})"
    return None


def _list(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
