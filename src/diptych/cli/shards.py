"""`diptych shards`: what people have becomes shards, and what is in shards is shown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diptych.cli.output import ProgressBar, counted, list_counts, printable, shorten
from diptych.collect.config import BuildConfig, ReadConfig
from diptych.errors import PASSING, UsageError
from diptych.shards.config import SourceConfig
from diptych.stage.config import EngineConfig

if TYPE_CHECKING:
    from diptych.collect.run import BuildReport
    from diptych.collect.sources import AnySource
    from diptych.shards.dataset import Dataset

MAX_CAPTION = 200
"""Characters of a caption that are printed."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """Pictures with captions, as people have them -> shards. Resumable: rerun the same command to continue."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """CSV, TSV, JSON, JSON lines, Parquet, COCO's annotations, tars (also .gz, .zst), folders of Hugging Face datasets
    or of x.jpg with x.txt; globs and ranges of them. What each is is told by its content, and said."""
    out: Path
    """Folder for the shards: new, or one that the same command began."""
    samples_per_shard: int = 1000
    """Samples of a shard, at most."""
    read: ReadConfig = field(default_factory=ReadConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.collect.inputs import open_sources

        config = BuildConfig(
            sources=self.sources, out=self.out, read=self.read, samples_per_shard=self.samples_per_shard
        )
        sources = open_sources(config.sources, config.read, config.samples_per_shard)
        report = build(config, sources, self.engine)
        stage = report.stage
        print(f"{counted(stage.kept, 'sample')} of {stage.rows:,} in {counted(len(report.dataset.shards), 'shard')}")
        if stage.found:
            print(f"tasks: {stage.done:,} done, {stage.found:,} had been done before")
        print_dropped(report)
        print(f"shards: {printable(self.out)}")
        key = " --caption-key captions" if report.captions > 1 else ""
        print(f"train on them: diptych train ViT-B-32 --data {printable(self.out)} --out runs/mine{key}")
        if key:
            print("(some pictures have several captions: --caption-key draws one at each visit)")
        return 0


def build(config: BuildConfig, sources: "Sequence[AnySource]", engine: EngineConfig) -> "BuildReport":
    """Say what the sources were taken for, and make shards of them under a progress bar."""
    from diptych.collect.run import run
    from diptych.stage.run import Engine

    for source in sources[:20]:
        print(f"{shorten(source.name, 200)}: {shorten(source.said, 400)}")
    if len(sources) > 20:
        print(f"and {len(sources) - 20:,} more")
    with ProgressBar("building") as bar:
        seen = 0

        def show(_stage: str, record: object, done: int, total: int) -> None:
            nonlocal seen
            seen += getattr(record, "kept", 0)
            bar.update(done, total, f"tasks  {seen:,} samples")

        with Engine.open(engine, show) as opened:
            if opened.kind == "local" and sum(len(source.ranges) for source in sources) == 1:
                opened.processes = 0  # another process would take longer to start than the work
            return run(config, sources, engine=opened)


def open_data(texts: tuple[str, ...]) -> tuple[SourceConfig, ...]:
    """What `--data` names. Of a CSV, JSON or a folder of pairs shards are made in the cache, once as long as neither it
    nor a picture changes; for other kinds UsageError names the command."""
    return tuple(_as_shards(SourceConfig.parse(text)) for text in texts)


def _as_shards(source: SourceConfig) -> SourceConfig:
    path = source.path
    if path is None or not path.exists() or _is_shards(path):
        return source
    from diptych import files
    from diptych.collect.inputs import open_sources
    from diptych.collect.sources import ListedSource, TableSource

    command = f"make shards of it once: diptych shards build {path} --out shards, then --data shards"
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
        raise UsageError(f"{path} is not shards, and several processes would all convert it; {command}")
    config = BuildConfig(sources=(str(path),), out=Path())
    sources = open_sources(config.sources, config.read, config.samples_per_shard, stamps=True)
    if not all(isinstance(one, ListedSource | TableSource) for one in sources):
        raise UsageError(f"{path} is not shards ({sources[0].said}); {command}")
    try:
        out = files.cache_folder("shards") / files.digest(" ".join(one.fingerprint for one in sources))
    except OSError as error:
        raise UsageError(f"there is no cache folder ({error}); {command}") from None
    if not (out / "dataset.json").exists():
        print(f"shards are made of {printable(path)} once, in the cache")
        report = build(replace(config, out=out), sources, EngineConfig())
        print_dropped(report)
    print(f"{printable(path)}: shards in {printable(out)}", flush=True)
    return replace(source, path=out)


def _is_shards(path: Path) -> bool:
    if path.is_dir():
        return (path / "dataset.json").exists() or any(path.glob("*.tar"))
    with open(path, "rb") as file:
        head = file.read(512)
    return path.suffix == ".tar" or head[257:262] == b"ustar"


def print_dropped(report: "BuildReport") -> None:
    """How many were left out and why."""
    dropped = report.stage.dropped
    if dropped:
        place = printable(report.stage.folder / "skipped.jsonl")
        print(f"left out: {list_counts(dropped)}; each is named in {place}")
    if any(reason in PASSING or reason == "missing" for reason in dropped):
        print("the same command tries again what was missing or could not be read")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every member of a dataset and decode every picture: samples = usable + counted by reason."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of shards, a tar, or a range of them."""
    threads: int | None = None
    """That decode at once; by default one a core."""

    def __call__(self) -> int:
        from diptych.shards.check import check

        report = check(_load(self.data), self.threads)
        for shard, key, reason in report.broken[:20]:
            print(f"  {printable(shard)} {shorten(key, 200)}: {reason}")
        if len(report.broken) > 20:
            print(f"  and {len(report.broken) - 20:,} more")
        files = f"{counted(report.members, 'file')}, {report.bytes:,} bytes"
        print(f"{counted(report.shards, 'shard')}, {files}")
        reasons = f" + {list_counts(report.reasons)}" if report.reasons else ""
        print(f"{counted(report.samples, 'sample')} = {report.usable:,} usable{reasons}")
        return 1 if report.reasons else 0


@dataclass(frozen=True, kw_only=True)
class Head:
    """Print some samples: key, size, caption."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of shards, a tar, or a range of them."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10
    """Samples."""

    def __call__(self) -> int:
        from diptych.shards.check import pick

        for shown in pick(_load(self.data), _positive(self.count)):
            size = f"{shown.size[0]}x{shown.size[1]}" if shown.size else "-"
            first, *others = shown.captions
            more = f" (and {len(others)} more)" if others else ""
            text = shown.reason or f"{shorten(first, MAX_CAPTION)}{more}"
            print(f"{printable(shown.key)}\t{size}\t{len(shown.image)}\t{text}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Show:
    """Write a contact sheet: one HTML file with small pictures and their captions."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of shards, a tar, or a range of them."""
    out: Path = Path("shards.html")
    """The file."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 100
    """Samples, at even distances over the whole dataset."""

    def __call__(self) -> int:
        from diptych.shards.check import write_sheet

        shown = write_sheet(_load(self.data), self.out, _positive(self.count))
        print(f"{counted(shown, 'sample')}: {printable(self.out)}")
        return 0


def _load(data: str) -> "Dataset":
    from diptych.shards.dataset import load_dataset

    return load_dataset(data)


def _positive(count: int) -> int:
    if count < 1:
        raise UsageError(f"count {count} must be 1 or more")
    return count


COMMANDS: dict[str, type] = {"build": Build, "check": Check, "head": Head, "show": Show}
"""By name; `cli/__init__.py` hangs them below `diptych shards`."""

Action = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Head, tyro.conf.subcommand("head")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Make shards of what you have (CSV, folders, COCO, Parquet, tars), check them, look at them.

    Example: diptych shards build pairs.csv --out shards
    """

    action: Action

    def __call__(self) -> int:
        return self.action()
