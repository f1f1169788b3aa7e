"""`diptych embed`: many pictures or texts to a folder of features that is finished, or can be gone on with."""

import contextlib
import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.embed.bulk.config import EmbedConfig
from diptych.embed.bulk.folder import FeatureFolder, describe, plan_parts
from diptych.embed.bulk.inputs import open_inputs
from diptych.embed.bulk.pipeline import compute_parts, open_pipeline
from diptych.embed.images import image_space
from diptych.embed.sources import Source
from diptych.embed.texts import text_space
from diptych.errors import RunLockedError
from diptych.files import make_folder
from diptych.model.inference.precision import choose_text_precision

_WINDOW = 15.0
"""Seconds over which the speed is averaged."""


@dataclass(frozen=True, kw_only=True)
class EmbedProgress:
    """How far a run is, in inputs."""

    done: int
    """Parts of earlier runs included."""
    total: int
    skipped: int
    """Inputs that this run has skipped."""
    per_second: float
    """Inputs a second, of late."""

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.per_second if self.per_second else None


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """How a run ended."""

    inputs: int
    features: int
    skipped: Mapping[str, int]
    """Reason -> how many, of all runs."""
    resumed: int
    """Inputs whose parts earlier runs had done."""
    passed_over: Mapping[str, int]
    """Suffix -> files in folders that were not taken for pictures."""
    precision: Mapping[str, str]
    """Precision of each tower that was used."""
    seconds: float
    out: Path


def run(config: EmbedConfig, *, on_progress: Callable[[EmbedProgress], None] | None = None) -> EmbedReport:
    """Embed everything that `config` names. Started again, it does what is not done."""
    began = time.monotonic()
    kind = None if config.work.kind == "auto" else config.work.kind
    sources = open_inputs(config.inputs, kind)
    pipeline = open_pipeline(config)
    precision = pipeline.tower.precision  # what `auto` means here is what it means everywhere
    config = replace(config, work=replace(config.work, precision=precision))
    model = describe_model(config, pipeline.loaded, sources)
    identity = describe(model, config.output, sources, batch_size=config.work.batch_size)
    with locked(config.out):
        folder = FeatureFolder(config.out, identity, config.output)
        folder.begin()
        parts = plan_parts(sources, config.output.part_rows)
        records = [(part, folder.read_record(part)) for part in parts]
        todo = [part for part, record in records if record is None]
        done = sum(part.stop - part.start for part, record in records if record is not None)
        meter = _Meter(done, sum(source.rows for source in sources), on_progress)
        if config.work.engine == "ray":
            from diptych.embed.bulk.ray import run_on_ray

            run_on_ray(config, folder, sources, todo, meter.count)
        else:
            compute_parts(pipeline, folder, sources, todo, meter.count)
        counts = folder.finish(sources, parts)
    return EmbedReport(
        **counts,
        resumed=done,
        passed_over=_add(source.passed_over for source in sources),
        precision={kind: model[f"{kind}_precision"] for kind in ("image", "text") if f"{kind}_precision" in model},
        seconds=time.monotonic() - began,
        out=config.out,
    )


def describe_model(config: EmbedConfig, loaded: Loaded, sources: Sequence[Source]) -> dict[str, Any]:
    """What names the model in the manifest: of the towers only those that are used."""
    about: dict[str, Any] = {"source": config.model, "embed_dim": loaded.model.config.embed_dim}
    kinds = {source.kind for source in sources}
    if "image" in kinds:
        about["image_space"] = image_space(loaded, config.work.precision)
        about["preprocess"] = to_dict(loaded.preprocess)
        about["image_precision"] = config.work.precision
    if "text" in kinds:
        about["text_space"] = text_space(loaded, config.work.precision)
        about["text_precision"] = choose_text_precision(config.work.precision, loaded.model.logit_scale.device)
        about["tokenizer"] = loaded.tokenizer.fingerprint
    return about


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder; RunLockedError if another process does. The lock ends with the process, however it ends."""
    make_folder(out)
    with open(out / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise RunLockedError(
                f"{out} is being filled by another process ({lock.read().strip() or 'unknown'}); wait for it, stop it, "
                "or name another --out"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield


class _Meter:
    """Counts inputs and tells how fast they go."""

    def __init__(self, done: int, total: int, tell: Callable[[EmbedProgress], None] | None) -> None:
        self.done, self.total, self.skipped, self.tell = done, total, 0, tell
        self._marks = deque([(time.monotonic(), done)])

    def count(self, done: int, skipped: int) -> None:
        self.done += done + skipped
        self.skipped += skipped
        now = time.monotonic()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW:
            self._marks.popleft()
        since, before = self._marks[0]
        if self.tell is not None:
            rate = (self.done - before) / max(now - since, 1e-9)
            self.tell(EmbedProgress(done=self.done, total=self.total, skipped=self.skipped, per_second=rate))


def _add(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total
