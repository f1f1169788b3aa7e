"""Pairs with the addresses of pictures -> pairs with pictures. The asking is in `worker`.

    work/fetch/
      ledger/0000/...              what became of each address, and the bytes as they came: the memory
      outcomes/part-00000.json     a hash of what the ledger says of a part's addresses
      part-00000.parquet ...       as every stage

Two steps. The first asks the web and is no pure function of anything: it fills the ledger, every address once however
many pairs have it. The second is a stage like the others: a row becomes what the ledger and the stored bytes say of
its address, in the order of the input. So the files and the manifest's hash depend on what the web answered and not on
when, in which order, in how many processes or after how many kills.

A later run asks only what failed (`retry`) and makes only those parts anew whose outcomes changed.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.ledger import Ledger, Reader, partition_of
from diptych.curate.fetch.outcomes import OK
from diptych.curate.fetch.worker import fetch_partition
from diptych.curate.images.blocklist import KnownHashes, read_known
from diptych.curate.images.prepare import prepare
from diptych.curate.rows import EXPECTED_HASH, with_reason
from diptych.errors import PictureError, ShardError, UsageError
from diptych.pair import format_details
from diptych.stage.engines import end_with_parent
from diptych.stage.folder import MANIFEST_FILE, read_manifest, read_part
from diptych.stage.job import Task
from diptych.stage.run import Engine, StageReport, tasks_of

_ROWS = 64
"""Rows of a batch that is given on with pictures: bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """What a fetch did."""

    outcomes: dict[str, int]
    """`ok` or a reason -> addresses, over all runs."""
    asked: int
    """Addresses that this run tried."""
    stage: StageReport


def run(
    config: FetchConfig, *, engine: Engine, on_progress: Callable[[Counter[str]], None] | None = None
) -> FetchReport:
    """Fetch what is missing and write the pairs; `on_progress` is told outcomes -> addresses now and then."""
    tasks = tasks_of(config.folder)
    known = read_known(config.known_hashes, config.known_distance, config.max_pixels)
    ledger = config.out / "ledger"
    _begin(config, ledger)
    _plan(config, tasks, ledger)
    asked = _ask_all(config, known, on_progress)
    _reopen_changed(config, tasks, ledger)
    prepared: dict[str, Any] = {
        "size": config.size,
        "quality": config.quality,
        "keep_original": config.keep_original,
        "min_side": config.min_side,
        "max_aspect": config.max_aspect,
        "max_pixels": config.max_pixels,
    }
    report = engine.run_stage(
        Build(ledger=ledger, partitions=config.partitions, known=known, **prepared),
        tasks,
        config.out,
        _deciding(config) | prepared | {"known_hashes": config.known_hashes},
        schema=_schema(tasks),
        parent=read_manifest(config.folder).hash if (config.folder / MANIFEST_FILE).exists() else None,
    )
    return FetchReport(outcomes=dict(sorted(count_outcomes(config).items())), asked=asked, stage=report)


def count_outcomes(config: FetchConfig) -> Counter[str]:
    """Outcome -> addresses, over all partitions; not tried ones count as ``."""
    total: Counter[str] = Counter()
    for place in range(config.partitions):
        with Ledger(config.out / "ledger" / f"{place:04d}") as ledger:
            total += ledger.counts()
    return total


def forget(out: Path, urls: Iterable[str]) -> int:
    """Remove pictures from a fetch's folder for good; returns how many addresses were known.

    Their rows leave the parts, with the reason `deleted`, when the fetch is run again.
    """
    partitions = _read_settings(out / "ledger" / "settings.json")["partitions"]
    known = 0
    for url in urls:
        with Ledger(out / "ledger" / f"{partition_of(url, partitions):04d}") as ledger:
            known += ledger.forget(url)
    return known


def _deciding(config: FetchConfig) -> dict[str, Any]:
    """What decides whether an address may be asked and its answer kept; the rest only decides when."""
    return {
        "product": config.product,
        "max_bytes": config.max_bytes,
        "max_redirects": config.max_redirects,
        "ports": list(config.ports),
        "robots": config.robots,
        "opt_outs": list(config.opt_outs),
    }


def _read_settings(path: Path) -> dict[str, Any]:
    """What a ledger was begun with; ShardError if that cannot be read."""
    try:
        settings = files.read_json(path)
        if not isinstance(settings, dict) or type(settings.get("partitions")) is not int:
            raise ValueError("it is no table of settings")
    except ValueError as error:
        raise ShardError(
            f"{path} is damaged ({error}); put it back from a copy, or fetch into another folder"
        ) from None
    return settings


def _read_mark(path: Path) -> Any:
    """A note of what was done; None where there is none, or a damaged one: then it is done again."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None


def _begin(config: FetchConfig, ledger: Path) -> None:
    """Hold the settings against those that the ledger was begun with."""
    ledger.mkdir(parents=True, exist_ok=True)
    path, settings = ledger / "settings.json", _deciding(config) | {"partitions": config.partitions}
    if not path.exists():
        files.write_json(path, settings)
        return
    begun = _read_settings(path)
    for name, value in settings.items():
        if begun.get(name) != value:
            raise UsageError(
                f"{config.out} was begun with {name} {begun.get(name)}, not {value}; its ledger would mix both: use "
                "the old value or another folder"
            )


def _plan(config: FetchConfig, tasks: Sequence[Task], ledger: Path) -> None:
    """Write every address into the ledger of its host's partition; each part once."""
    planned = ledger / "planned"
    planned.mkdir(exist_ok=True)
    for task in tasks:
        mark = planned / f"{task.name}.json"
        described = task.describe()
        if _read_mark(mark) == described:
            continue
        urls: dict[int, set[str]] = {}
        for path in task.inputs:
            for batch in read_part(Path(path), ["image_url"]):
                for url in filter(None, batch.column(0).to_pylist()):
                    urls.setdefault(partition_of(url, config.partitions), set()).add(url)
        for place, chosen in urls.items():
            with Ledger(ledger / f"{place:04d}") as one:
                one.add(sorted(chosen))
        files.write_json(mark, described)
    for place in range(config.partitions):
        (ledger / f"{place:04d}").mkdir(exist_ok=True)


def _ask_all(config: FetchConfig, known: KnownHashes, on_progress: Callable[[Counter[str]], None] | None) -> int:
    if config.partitions == 1:
        return fetch_partition(config, 0, known, on_progress=on_progress)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.partitions, context, initializer=end_with_parent) as pool:
        running = [pool.submit(fetch_partition, config, place, known) for place in range(config.partitions)]
        return sum(future.result() for future in running)


def _schema(tasks: Sequence[Task]) -> pa.Schema:
    """The columns of the pairs that are read; pictures are added to them."""
    return pq.read_schema(tasks[0].inputs[0]).remove_metadata()


def _reopen_changed(config: FetchConfig, tasks: Sequence[Task], ledger: Path) -> None:
    """Take back the commit of each part of which the ledger says something else than when it was made."""
    folder = config.out / "outcomes"
    folder.mkdir(exist_ok=True)
    with Reader(ledger, config.partitions) as reader:
        for task in tasks:
            digest = _outcomes_hash(task, reader)
            path = folder / f"{task.name}.json"
            if _read_mark(path) == digest:
                continue
            (config.out / "done" / f"{task.name}.json").unlink(missing_ok=True)
            files.write_json(path, digest)


def _outcomes_hash(task: Task, reader: Reader) -> str:
    digest = hashlib.sha256()
    for path in task.inputs:
        for batch in read_part(Path(path), ["image_url"]):
            for url in batch.column(0).to_pylist():
                entry = reader.find(url) if url else None
                told = [entry.outcome, entry.sha256, entry.final_url] if entry else None
                digest.update(json.dumps(told).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Build:
    """The stage: rows with addresses -> rows with the pictures that the ledger holds."""

    ledger: Path
    partitions: int
    known: KnownHashes
    size: int
    quality: int
    keep_original: bool
    min_side: int
    max_aspect: float
    max_pixels: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with Reader(self.ledger, self.partitions) as reader:
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield self._fill(batch.slice(start, _ROWS), reader)

    def _fill(self, batch: pa.RecordBatch, reader: Reader) -> pa.RecordBatch:
        images, details, reasons = [], [], []
        for url, known in zip(batch.column("image_url").to_pylist(), batch.column("details").to_pylist(), strict=True):
            said = files.parse_json(known)
            found = self._picture(url, reader, said.get(EXPECTED_HASH))
            if isinstance(found, str):
                images.append(None)
                details.append(known)
                reasons.append(found)
                continue
            image, facts = found
            images.append(image)
            details.append(format_details(said | facts))
            reasons.append(None)
        for name, values in (("image", images), ("details", details)):
            place = batch.schema.get_field_index(name)
            column = batch.schema.field(place)
            batch = batch.set_column(place, column, pa.array(values, column.type))
        return with_reason(batch, reasons)

    def _picture(self, url: str | None, reader: Reader, expected: object) -> tuple[bytes, dict[str, Any]] | str:
        """A picture and what is noted of it, or the reason why there is none."""
        entry = reader.find(url) if url else None
        if url is None or entry is None:
            return "url" if not url else "not_tried"
        if entry.outcome != OK:
            return entry.outcome
        data = reader.read(url, entry)
        if data is None:
            raise ShardError(f"the stored bytes of {url} in {self.ledger} are damaged; delete that ledger, run again")
        if isinstance(expected, str) and not _has_hash(data, expected):
            return "hash_differs"
        if self.known and self.known(data) is not None:
            return "known_hash"
        try:
            made = prepare(
                data,
                size=self.size,
                quality=self.quality,
                keep_original=self.keep_original,
                min_side=self.min_side,
                max_aspect=self.max_aspect,
                max_pixels=self.max_pixels,
            )
        except PictureError as error:
            return error.reason
        facts = {
            "sha256": entry.sha256 or "",
            "width": made.width,
            "height": made.height,
            "original_width": made.original_width,
            "original_height": made.original_height,
        }
        return made.data, facts | ({"final_url": entry.final_url} if entry.final_url else {})


_HASHES = {32: "md5", 64: "sha256", 128: "sha512"}
"""Hexadecimal digits of a hash -> which one it is."""


def _has_hash(data: bytes, expected: str) -> bool:
    return hashlib.new(_HASHES[len(expected)], data, usedforsecurity=False).hexdigest() == expected.lower()
