"""`diptych shards build`: sources of pairs to shards, a resumable stage.

    00000.tar 00000.arrow ...  a task's shard and its index; a task of more samples has 00000-001.tar, ... too
    dropped/00000.jsonl        source, id and reason of what that task left out
    skipped.jsonl              all of them
    dataset.json               the dataset, once everything is done

A task is a piece of a source. A sample's key is the task's number and its own in it, so that no two are the same. One
picture at a time is in memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diptych import files
from diptych.collect.config import BuildConfig
from diptych.collect.sources import AnySource, Sample
from diptych.embed.sources import Part, fetch, format_dropped
from diptych.errors import PASSING, PictureError, UsageError
from diptych.pair import Pair
from diptych.shards.dataset import Dataset
from diptych.shards.write import iter_shards, why_not, write_description
from diptych.stage.folder import TaskRecord, read_begun, read_manifest
from diptych.stage.job import Job, Task
from diptych.stage.run import Engine, StageReport

STAGE = "build"
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What was built."""

    stage: StageReport
    dataset: Dataset
    captions: int
    """Captions of the sample that has most."""


@dataclass(frozen=True, kw_only=True)
class BuildJob(Job):
    """Pieces of sources to shards."""

    sources: tuple[AnySource, ...]
    samples_per_shard: int

    REMEDY: ClassVar[str] = "name a new folder as --out, or add --redo to make it anew"

    @property
    def stage(self) -> str:
        """The same wherever the folder is."""
        return STAGE

    def is_final(self, record: TaskRecord) -> bool:
        """A picture that was not there, or could not be read, may be there another time."""
        return not any(reason in PASSING | {"missing"} for reason in record.dropped)

    def do(self, task: Task) -> TaskRecord:
        """Write the shards of one piece."""
        assert isinstance(task, Part)
        source = self.sources[task.source]
        dropped: list[tuple[str, str]] = []

        def choose() -> Iterator[Pair]:
            for number, sample in enumerate(source.read(task.start, task.stop)):
                pair = _make_pair(f"{task.name}-{number:05d}", sample)
                if isinstance(pair, Pair):
                    yield pair
                else:
                    dropped.append((sample.row.id, pair))

        names = (f"{task.name}{f'-{number:03d}' if number else ''}.tar" for number in range(1000000))
        paths = (self.folder / name for name in names)
        indexes = list(iter_shards(choose(), paths, self.samples_per_shard))
        written = [name for index in indexes for name in (index.path.name, index.path.with_suffix(".arrow").name)]
        if dropped:
            written.append(f"dropped/{task.name}.jsonl")
            files.write_bytes(self.folder / written[-1], format_dropped(source.name, dropped))
        return self.commit(
            task,
            kept=sum(map(len, indexes)),
            dropped=Counter(reason for _, reason in dropped),
            written={name: files.sha256(self.folder / name) for name in written},
        )


def _make_pair(key: str, sample: Sample) -> Pair | str:
    """The pair of a sample, or the reason why there is none."""
    if sample.row.reason:
        return sample.row.reason
    try:
        image = fetch(sample.row)
    except PictureError as error:
        return error.reason
    assert isinstance(image, bytes)
    details = {**sample.details, "captions": list(sample.captions)}
    pair = Pair(key=key, caption=sample.captions[0], image=image, details=details)
    return why_not(pair, ()) or pair


def run(config: BuildConfig, sources: Sequence[AnySource], *, engine: Engine) -> BuildReport:
    """Build what is not built yet; raises UsageError if no pair is left."""
    pieces = [(number, *piece) for number, source in enumerate(sources) for piece in source.ranges]
    tasks = [
        Part(f"{i:05d}", (sources[number].name,), source=number, start=start, stop=stop)
        for i, (number, start, stop) in enumerate(pieces)
    ]
    inputs = [{"source": source.name, "fingerprint": source.fingerprint} for source in sources]
    job = BuildJob(
        folder=config.out,
        settings={"inputs": inputs, "samples_per_shard": config.samples_per_shard},
        sources=tuple(sources),
        samples_per_shard=config.samples_per_shard,
    )
    with files.hold_folder(config.out):
        _require_ours(config.out)
        report = engine.run_job(job, tasks, prepare=lambda _: _reopen(config.out), hold=False)
        written = list(read_manifest(config.out).files)  # in the order of the tasks
        dropped = [name for name in written if name.startswith("dropped/")]
        files.write_bytes(config.out / SKIPPED_FILE, b"".join((config.out / name).read_bytes() for name in dropped))
        tars = [config.out / name for name in written if name.endswith(".tar")]
        if not tars:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.dropped.items())
            raise UsageError(f"no pair was left to write into {config.out}; dropped: {reasons or 'none came'}")
        dataset = write_description(config.out, tars)
    most = max((_count_captions(dataset)), default=1)
    return BuildReport(stage=report, dataset=dataset, captions=most)


def _reopen(out: Path) -> None:
    (out / "dataset.json").unlink(missing_ok=True)


def _require_ours(out: Path) -> None:
    begun: Mapping[str, Any] | None = read_begun(out)
    if (begun is None or begun["stage"] != STAGE) and any(out.glob("[!.]*")):
        raise UsageError(f"{out} is not empty and was not begun by `diptych shards build`; name a new folder as --out")


def _count_captions(dataset: Dataset) -> Iterator[int]:
    for details in dataset.shards[0].table["details"].to_pylist():
        yield len(files.parse_json(details)["captions"])
