"""`diptych embed`: many pictures or texts to a folder of features that is finished, or can be gone on with."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from diptych import files
from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.embed.bulk.config import EmbedConfig, WorkConfig
from diptych.embed.bulk.folder import STAGE
from diptych.embed.bulk.inputs import open_inputs
from diptych.embed.bulk.job import EmbedJob, Part, iter_contiguous_parts, open_model, plan_parts
from diptych.embed.images import ImageTower, image_space
from diptych.embed.sources import Source, format_dropped
from diptych.embed.texts import text_space
from diptych.errors import UsageError
from diptych.model.inference.precision import choose_text_precision
from diptych.stage.engines import connect_ray
from diptych.stage.folder import MANIFEST_FILE, TaskRecord, read_begun, read_done, read_manifest
from diptych.stage.run import Engine

SKIPPED_FILE = "skipped.jsonl"
PARTS = 8
"""Parts that a Ray actor is given at a time, at most."""
_WINDOW = 15.0
"""Seconds over which the speed is averaged."""
_PAUSE = 0.1
"""Seconds between two reports."""


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
    cut: int
    """Texts that this run cut at the tokens that the model reads; not counted on a cluster."""
    seconds: float
    out: Path


def run(config: EmbedConfig, *, on_progress: Callable[[EmbedProgress], None] | None = None) -> EmbedReport:
    """Embed everything that `config` names. Started again, it does what is not done."""
    began = time.monotonic()
    sources = tuple(open_inputs(config.inputs, None if config.work.kind == "auto" else config.work.kind))
    loaded = open_model(config)
    precision = ImageTower(loaded, config.work.precision).precision  # what `auto` means here it means everywhere
    config = replace(config, work=replace(config.work, precision=precision))
    parts = plan_parts(sources, config.output.part_rows)
    meter = _Meter(sum(source.rows for source in sources), on_progress)
    model = describe_model(config, loaded, sources)
    engine, config = _open_engine(config, meter)
    job = EmbedJob(folder=config.out, settings=_describe(config, model, sources), config=config, sources=sources)
    if engine.kind == "local":
        job = replace(job, model=loaded, on_row=meter.count, on_cut=meter.count_cut)
    with files.hold_folder(config.out):
        engine.redo = _may_be_taken_over(config.out, job)
        report = engine.run_job(job, parts, prepare=meter.resume, hold=False)
        lines = [format_dropped(source.name, source.lost) for source in sources]
        dropped = (name for name in read_manifest(config.out).files if name.startswith("dropped/"))
        lines += [(config.out / name).read_bytes() for name in dropped]
        files.write_bytes(config.out / SKIPPED_FILE, b"".join(lines))
    lost = Counter(reason for source in sources for _, reason in source.lost)
    return EmbedReport(
        inputs=report.rows + lost.total(),
        features=report.kept,
        skipped=dict(sorted((Counter(report.dropped) + lost).items())),
        resumed=report.rows - meter.computed,
        passed_over=dict(sum((Counter(source.passed_over) for source in sources), Counter[str]())),
        precision={kind: model[f"{kind}_precision"] for kind in ("image", "text") if f"{kind}_precision" in model},
        cut=meter.cut,
        seconds=time.monotonic() - began,
        out=config.out,
    )


def _may_be_taken_over(out: Path, job: EmbedJob) -> bool:
    """Whether a folder was begun with nothing else, or holds no feature of it; UsageError if it is not ours."""
    begun = read_begun(out)
    if (begun is None or begun["stage"] != STAGE) and any(out.glob("[!.]*")):
        raise UsageError(
            f"{out} is not empty and holds no {MANIFEST_FILE} of this version of `diptych embed`; name a new folder as "
            "--out"
        )
    if begun is None or job.find_difference(begun, job.describe()) is None:
        return True
    records = (read_done(out, path.stem) for path in (out / "done").glob("*.json"))
    return all(record is not None and not record.kept for record in records)


def _describe(config: EmbedConfig, model: Mapping[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """What makes a folder of features what it is."""
    inputs: list[dict[str, Any]] = []
    first = 0
    for source in sources:
        parts = math.ceil(source.rows / config.output.part_rows)
        entry = {"source": source.name, "kind": source.kind, "rows": source.rows, "lost": len(source.lost)}
        entry |= {"fingerprint": source.fingerprint, "first_part": first, "parts": parts}
        inputs.append(entry | ({"passed_over": source.passed_over} if source.passed_over else {}))
        first += parts
    settings = to_dict(config.output) | {"batch_size": config.work.batch_size}
    return {"model": model, "settings": settings, "inputs": inputs}


def _open_engine(config: EmbedConfig, meter: "_Meter") -> tuple[Engine, EmbedConfig]:
    """Threads of this process, or actors of a cluster; and the settings with the threads of each actor."""
    if config.work.engine == "local":
        return Engine(batches=lambda tasks: [tasks]), config
    actors, resources = _size_actors(config.work, connect_ray())
    engine = Engine(
        kind="ray",
        processes=actors,
        resources=resources,
        on_task=lambda _stage, record, _done, _total: meter.count_part(record),
        batches=lambda tasks: iter_contiguous_parts(cast(Sequence[Part], tasks), _share(len(tasks), actors)),
    )
    return engine, replace(config, work=replace(config.work, threads=config.work.threads or resources["num_cpus"]))


def _share(parts: int, actors: int) -> int:
    """Parts that an actor is given at a time: few at the end of a run leave nobody idle for long."""
    return min(PARTS, math.ceil(parts / (2 * actors)))


def _size_actors(work: WorkConfig, ray: Any) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each takes: a GPU; or a machine's cores, shared if more actors are asked for."""
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), max(1, int(total.get("CPU", 1)))
    if gpus and work.device != "cpu":
        actors = min(work.actors or gpus, gpus)
        return actors, {"num_gpus": 1, "num_cpus": max(1, cpus // gpus), "scheduling_strategy": "SPREAD"}
    machines = [node for node in ray.nodes() if node["Alive"]]
    actors = min(work.actors or len(machines), cpus)
    each = max(1, min(int(node["Resources"].get("CPU", 1)) for node in machines))
    return actors, {"num_cpus": min(each, max(1, cpus // actors)), "scheduling_strategy": "SPREAD"}


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


class _Meter:
    """Counts inputs and tells how fast they go."""

    def __init__(self, total: int, tell: Callable[[EmbedProgress], None] | None) -> None:
        self.total, self.tell, self._lock = total, tell, threading.Lock()
        self.found = self.computed = self.skipped = self.cut = 0
        self._marks = deque([(time.monotonic(), 0)])

    def resume(self, found: Mapping[str, TaskRecord]) -> None:
        """Begin behind what earlier runs have done."""
        self.found = sum(record.rows for record in found.values())
        self._marks = deque([(time.monotonic(), 0)])

    def count_part(self, record: TaskRecord) -> None:
        """Count a part that was computed elsewhere."""
        self.computed += record.rows - 1
        self.skipped += record.rows - record.kept
        self.count(False)

    def count_cut(self, texts: int) -> None:
        """Count texts that were cut; called from several threads."""
        with self._lock:
            self.cut += texts

    def count(self, skipped: bool) -> None:
        """Count an input, and tell a few times a second."""
        self.computed += 1
        self.skipped += skipped
        now, done = time.monotonic(), self.found + self.computed
        if self.tell is None or (now - self._marks[-1][0] < _PAUSE and self.computed > 1 and done < self.total):
            return
        self._marks.append((now, self.computed))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW:
            self._marks.popleft()
        since, before = self._marks[0]
        rate = (self.computed - before) / max(now - since, 1e-9)
        self.tell(EmbedProgress(done=done, total=self.total, skipped=self.skipped, per_second=rate))
