"""Models x datasets x protocols into a results folder: opened, checked, embedded once, measured, written.

    for each model: for each dataset: open the splits that pending protocols need -> features -> one Result a protocol

A protocol whose file is there with the same settings is done; with other settings that is an error, unless it is to be
done again. What cannot be evaluated (not there, not what the registry says, too few pictures) is said and passed over.
Ranks of a job share the pictures; the first one measures and writes.
"""

import contextlib
import datetime
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import diptych
from diptych import files, ranks
from diptych.embed.cache import FeatureCache
from diptych.errors import DatasetError, DiptychError, NotFoundError, RunLockedError, UsageError
from diptych.evaluate import protocols
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.features import Embedder
from diptych.evaluate.labels import number_labels
from diptych.evaluate.models import OpenedModel, model_names, open_model
from diptych.evaluate.places import can_download, candidates, download, locate, where_to_get
from diptych.evaluate.protocols import ALLOWED, NATURAL, Arrays, Split, Task
from diptych.evaluate.registry import Dataset, Place, Used, load_suite
from diptych.evaluate.results import (
    Protocol,
    Result,
    load_result,
    result_path,
    save_model,
    save_result,
)
from diptych.evaluate.sources import Samples, open_samples
from diptych.ranks import Ranks

VERSION = 1
"""Of what is measured: a higher one does not take up results of a lower one."""
NEEDED: Mapping[Protocol, tuple[str, ...]] = {
    "zeroshot": ("test",),
    "prompts": ("test", "train"),
    "retrieval": ("test",),
    "temporal": ("test",),
    "overlap": ("test",),
    "probe": ("test", "train", "val"),
    "fewshot": ("test", "train"),
}
"""Splits that a protocol looks at; all but test may not be there."""
_TIMEOUT = 6 * 3600.0
"""Seconds that ranks wait for the first one while it measures."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What could not be evaluated, and why."""

    model: str
    dataset: str
    protocol: str
    """Empty: none of them."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """What came out."""

    results: tuple[Result, ...]
    """Of this suite, those that were there included."""
    resumed: int
    """Results that were there."""
    missing: Mapping[str, str]
    """Dataset that is not there -> where it can be had."""
    refused: tuple[Refused, ...]
    out: Path
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluateProgress:
    """What is being done."""

    model: str
    dataset: str
    split: str
    done: int
    total: int


OnProgress = Callable[[EvaluateProgress], None]


def run(config: EvaluateConfig, *, on_progress: OnProgress | None = None) -> EvaluateReport:
    """Evaluate; raises NotFoundError if none of the datasets is there."""
    us = ranks.connect(_TIMEOUT, config.device)
    try:
        with ranks.lost_ranks_named(us), _locked(config.out, us):
            return _Run(config, us, on_progress).run()
    finally:
        ranks.disconnect(us)


@contextlib.contextmanager
def _locked(out: Path, us: Ranks) -> Iterator[None]:
    """Two processes may fill one folder, not at once."""
    if not us.is_first:
        yield
        return
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunLockedError(
                f"{out} is being filled by another process; wait for it, or name another --out"
            ) from None
        yield


@dataclass
class _Run:
    config: EvaluateConfig
    us: Ranks
    on_progress: OnProgress | None
    results: list[Result] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    resumed: int = 0

    def run(self) -> EvaluateReport:
        started = time.monotonic()
        names = model_names(self.config.models)
        datasets = load_suite(self.config.suite)
        self._check_overlap(datasets)
        places = self._find(datasets)
        cache = FeatureCache(self.config.cache or self.config.out / ".features", self.config.cache_bytes)
        try:
            for name, source in names.items():
                with torch.inference_mode():
                    self._run_model(open_model(name, source, self.config, cache, self.us), datasets, places, cache)
        finally:
            cache.close()
        return EvaluateReport(
            results=tuple(self.results),
            resumed=self.resumed,
            missing=self.missing,
            refused=tuple(self.refused),
            out=self.config.out,
            seconds=time.monotonic() - started,
        )

    def _check_overlap(self, datasets: Sequence[Dataset]) -> None:
        if self.config.overlap is not None and len(datasets) != 1:
            raise UsageError(f"--overlap is of one dataset, the suite has {len(datasets)}; name it: --suite cifar10")

    def _find(self, datasets: Sequence[Dataset]) -> dict[str, tuple[Place, Path]]:
        """Where each dataset is; those that are not there are fetched or noted."""
        found: dict[str, tuple[Place, Path]] = {}
        for entry in datasets:
            place = locate(entry, self.config.data)
            if place is None and self.config.download and can_download(entry):
                problem = self._everywhere(lambda entry=entry: self._download(entry), only_first=True)
                if problem:
                    self.missing[entry.id] = f"{where_to_get(entry)} ({problem})"
                    continue
                place = locate(entry, self.config.data)
            if place is None:
                self.missing[entry.id] = where_to_get(entry)
            else:
                found[entry.id] = place
        if not found:
            lines = "".join(f"\n  {name}: {where}" for name, where in self.missing.items())
            hint = (
                "--download fetches what has a repository" if not self.config.download else "nothing could be fetched"
            )
            looked = ", ".join(str(path) for path in candidates(datasets[0], self.config.data)[:2]) if datasets else ""
            raise NotFoundError(
                f"none of the {len(datasets)} datasets is in {self.config.data} (looked for {looked}, ...); "
                f"{hint}:{lines}"
            )
        return found

    def _download(self, entry: Dataset) -> None:
        download(entry, self.config.data, "test")
        for protocol in self.config.protocols:
            for split in NEEDED[protocol][1:]:
                with contextlib.suppress(DiptychError):
                    download(entry, self.config.data, split)

    def _everywhere(self, work: Callable[[], None], *, only_first: bool = False) -> str:
        """Do something on every rank; what went wrong on any of them, for all of them."""
        problem = ""
        try:
            if self.us.is_first or not only_first:
                work()
        except (DatasetError, NotFoundError, DiptychError) as error:
            problem = str(error)
        return next((text for text in self.us.gather_objects(problem) if text), "")

    def _run_model(
        self,
        model: OpenedModel,
        datasets: Sequence[Dataset],
        places: Mapping[str, tuple[Place, Path]],
        cache: FeatureCache,
    ) -> None:
        if self.us.is_first:
            save_model(self.config.out, model.facts)
        embedder = Embedder(model.loaded, self.config.precision, cache, self.config.batch_size, self.us)
        for entry in datasets:
            if entry.id in places:
                _RunDataset(self, model, embedder, entry, *places[entry.id]).run()


@dataclass
class _RunDataset:
    """One model and one dataset."""

    parent: _Run
    model: OpenedModel
    embedder: Embedder
    entry: Dataset
    place: Place
    root: Path

    def run(self) -> None:
        config, us = self.parent.config, self.parent.us
        used = self.entry.as_used(config.profile)
        wanted = config.protocols or (NATURAL[self.entry.kind],)
        protocols_here: list[Protocol] = [one for one in NEEDED if one in wanted and one in ALLOWED[self.entry.kind]]
        opened: dict[str, Samples] = {}
        needed = sorted({split for one in protocols_here for split in NEEDED[one]})
        for split in needed:
            problem = self.parent._everywhere(lambda split=split: self._open(split, opened))
            if problem and split == "test":
                self._refuse("", problem)
                return
            if problem and split in opened:
                del opened[split]
        if not protocols_here:
            return
        settings: dict[Protocol, Mapping[str, Any]] = {one: self._settings(one, used, opened) for one in protocols_here}
        done, pending = self._look(settings)
        splits, problem = self._prepare(
            used, opened, sorted({s for one in pending for s in NEEDED[one]} & opened.keys())
        )
        if problem:
            for one in pending:
                self._refuse(one, problem)
            pending = []
        earlier = dict(done)
        for one in pending:
            if not us.is_first:
                continue
            task = Task(
                config=config,
                model=self.model.name,
                logit_scale=self.model.loaded.model.logit_scale.exp().item(),
                embed_texts=self.model.embed_texts,
                used=used,
                splits=splits,
                earlier=earlier,
            )
            try:
                earlier[one] = self._measure(one, task, settings[one])
            except (DatasetError, UsageError, NotFoundError) as error:
                self._refuse(one, str(error))
        self.parent.results += [earlier[one] for one in protocols_here if one in earlier]
        self.parent.resumed += len(done)

    def _open(self, split: str, opened: dict[str, Samples]) -> None:
        opened[split] = open_samples(self.place, self.root, split, self.entry.kind)

    def _settings(self, protocol: Protocol, used: Used, opened: Mapping[str, Samples]) -> dict[str, Any]:
        """What a result depends on; as JSON would give it back."""
        config = self.parent.config
        data = {split: opened[split].fingerprint for split in NEEDED[protocol] if split in opened}
        settings = {
            "version": VERSION,
            "profile": used.profile,
            "metric": used.metric,
            "names": files.digest(repr(used.names)),
            "templates": files.digest(repr(used.templates)),
            "prefix": used.prefix,
            "border": self.entry.border,
            "data": data,
            "images": self.embedder.space,
            "texts": self.model.text_space,
            "seed": config.seed,
        }
        if protocol == "fewshot":
            settings |= {"shots": list(config.shots), "seeds": config.seeds}
        if protocol == "overlap" and config.overlap is not None:
            settings["overlap"] = files.digest(repr(read_overlap(config.overlap)))
        return settings

    def _look(self, settings: Mapping[Protocol, Mapping[str, Any]]) -> tuple[dict[Protocol, Result], list[Protocol]]:
        """Which protocols are done, and which are to be done; the first rank decides."""
        config = self.parent.config
        done: dict[Protocol, Result] = {}
        problem = ""
        for one in settings if self.parent.us.is_first else ():
            path = result_path(config.out, self.model.name, self.entry.id, one)
            if not path.is_file():
                continue
            try:
                result = load_result(path)
                before = result.about.get("settings", {})
                if before == settings[one]:
                    done[one] = result
                elif not config.redo:
                    keys = settings[one].keys() | before.keys()
                    other = sorted(key for key in keys if settings[one].get(key) != before.get(key))
                    problem = (
                        f"{path} was made with other settings ({', '.join(other)}); name another --out, or say --redo "
                        "to make it again"
                    )
            except UsageError as error:
                problem = "" if config.redo else str(error)
        if problem := self.parent.us.tell(problem):
            raise UsageError(problem)
        done = self.parent.us.tell(done)
        return done, [one for one in settings if one not in done]

    def _prepare(
        self, used: Used, opened: Mapping[str, Samples], wanted: Sequence[str]
    ) -> tuple[dict[str, Split], str]:
        """Number the labels and embed the pictures of the splits; or why that cannot be."""
        splits: dict[str, Split] = {}

        def prepare(split: str) -> None:
            samples = opened[split]
            splits[split] = self._check(used, split, samples)

        for split in wanted:
            if problem := self.parent._everywhere(lambda split=split: prepare(split)):
                return {}, f"{split}: {problem}"
            samples, done = opened[split], 0

            def tell(count: int, split: str = split, samples: Samples = samples) -> None:
                nonlocal done
                done += count
                if self.parent.on_progress is None:
                    return
                self.parent.on_progress(
                    EvaluateProgress(
                        model=self.model.name, dataset=self.entry.id, split=split, done=done, total=len(samples)
                    )
                )

            try:
                embedded = self.embedder.embed(samples, self.entry.border, tell)
            except DatasetError as error:  # on every rank alike
                return {}, f"{split}: {error}"
            if not embedded.kept:
                return {}, f"{split}: no picture can be used ({dict(embedded.skipped)})"
            splits[split] = replace(splits[split], embedded=embedded)
        return splits, ""

    def _check(self, used: Used, split: str, samples: Samples) -> Split:
        """Hold a split against the registry; DatasetError, or warnings if those are enough."""
        numbered = protocols.NO_CLASSES
        if self.entry.kind != "captions":
            numbered = number_labels(used, samples, self.place)
        problems = []
        try:
            used.expect(split, len(samples) + samples.skipped.total())
        except DatasetError as error:
            problems.append((str(error), self.entry.split_published))
        present = {number for several in numbered.numbers for number in several}
        if absent := [names[0] for number, names in enumerate(numbered.names) if number not in present]:
            named = f"{split}: " + ", ".join(absent[:5]) + ", ..." * (len(absent) > 5)
            problems.append(
                (
                    f"{self.entry.id}: {len(absent)} of {len(numbered.names)} classes have no picture in {named}",
                    self.entry.split_published and used.splits.get(split) is not None and self.entry.kind == "single",
                )
            )
        if self.parent.config.on_mismatch == "stop" and (fatal := [text for text, stops in problems if stops]):
            raise DatasetError("; ".join(fatal) + "; --on-mismatch warn evaluates it all the same")
        return Split(
            samples=samples,
            numbered=numbered,
            embedded=protocols.NOTHING,
            warnings=tuple(text for text, _ in problems),
        )

    def _measure(self, protocol: Protocol, task: Task, settings: Mapping[str, Any]) -> Result:
        started = time.monotonic()
        result, arrays = _measure(protocol, task)
        about = {
            "diptych": diptych.__version__,
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "precision": self.embedder.tower.precision,
            "device": str(self.embedder.tower.device),
            "seed": task.config.seed,
            "source": self.model.facts.source,
            "data": str(task.test.samples.path),
            "layout": task.test.samples.layout,
            "seconds": round(time.monotonic() - started, 3),
            "settings": settings,
        }
        result = replace(result, about=about)
        path = result_path(task.config.out, result.model, result.dataset, protocol)
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrays:
            save_arrays(path.with_suffix(".npz"), arrays)  # before the result, whose file says that all is there
        save_result(task.config.out, result)
        return load_result(path)

    def _refuse(self, protocol: str, reason: str) -> None:
        self.parent.refused.append(
            Refused(model=self.model.name, dataset=self.entry.id, protocol=protocol, reason=reason)
        )


def _measure(protocol: Protocol, task: Task) -> tuple[Result, Arrays]:
    match protocol:
        case "zeroshot":
            return protocols.zero_shot(task)
        case "prompts":
            return protocols.prompts(task)
        case "retrieval":
            return protocols.retrieve(task)
        case "temporal":
            return protocols.temporal(task)
        case "probe":
            return protocols.probe(task)
        case "fewshot":
            return protocols.few_shot(task)
        case "overlap":
            assert task.config.overlap is not None
            return protocols.measure_overlap(task, read_overlap(task.config.overlap))
    raise UsageError(f"the protocol {protocol} is not one of `diptych evaluate`")


def read_overlap(path: Path) -> list[str]:
    """The keys of the pictures that were seen in training."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path} (overlap.parquet of `diptych curate contamination`)")
    try:
        return sorted(pq.read_table(path, columns=["key"]).column("key").to_pylist())
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path} has no column of keys: {error}") from None


def save_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz, whole or not there."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())
