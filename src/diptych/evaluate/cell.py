"""One model on one dataset: opened, checked, embedded once, measured by each protocol, written.

A protocol whose file is there with the same settings is done; with other settings that is an error, unless it is to be
done again. What cannot be evaluated is refused with a reason. Ranks of a job share the pictures; the first one measures
and writes.
"""

import datetime
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import diptych
from diptych import files
from diptych.errors import DatasetError, DiptychError, NotFoundError, UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import index_labels
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Dataset, Place, ResolvedDataset
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.models.features import Embedder
from diptych.evaluate.models.open import OpenedModel
from diptych.evaluate.protocols import probe as protocols_probe
from diptych.evaluate.protocols import task as protocols
from diptych.evaluate.protocols.shifts import probe_of_imagenet
from diptych.evaluate.protocols.task import ALLOWED, DEFAULT_PROTOCOL, Arrays, Split, Task
from diptych.evaluate.results import Protocol, Result, load_result, result_path, save_result
from diptych.ranks import Ranks

VERSION = 2
"""Version of what is measured: a higher one does not take up results of a lower one."""
REQUIRED_SPLITS: Mapping[Protocol, tuple[str, ...]] = {
    "zeroshot": ("test",),
    "prompts": ("test", "train"),
    "retrieval": ("test",),
    "temporal": ("test",),
    "overlap": ("test",),
    "probe": ("test", "train", "val"),
    "fewshot": ("test", "train"),
}
"""Splits that a protocol looks at; all but test may not be there."""
SETTING_LABELS: dict[str, str] = {
    "version": "an older version of diptych",
    "names": "class names",
    "data": "files or labels of the dataset",
    "images": "model or precision",
    "texts": "model or precision",
    "probe": "ImageNet's probe",
}
"""What settings that are not options are called to people."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What could not be evaluated, and why."""

    model: str
    dataset: str
    protocol: str
    """Empty: none of them."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class EvaluateProgress:
    """What is being done."""

    model: str
    dataset: str
    split: str
    done: int
    total: int


OnProgress = Callable[[EvaluateProgress], None]


def run_on_all_ranks(ranks: Ranks, work: Callable[[], None], *, only_first: bool = False) -> str:
    """Do something on every rank, or on the first; what went wrong on any of them, for all of them."""
    problem = ""
    try:
        if ranks.is_first or not only_first:
            work()
    except DiptychError as error:
        problem = str(error)
    return next((text for text in ranks.gather_objects(problem) if text), "")


@dataclass
class Cell:
    """One model and one dataset."""

    config: EvaluateConfig
    ranks: Ranks
    model: OpenedModel
    embedder: Embedder
    entry: Dataset
    place: Place
    """Where the dataset lies; its path counts from the next."""
    root: Path
    on_progress: OnProgress | None = None
    results: list[Result] = field(default_factory=list)
    """Results of the protocols, in order, earlier ones included."""
    resumed: int = 0
    """Results that were there."""
    refused: list[Refused] = field(default_factory=list)

    def run(self) -> None:
        """Measure what is not done."""
        config, ranks = self.config, self.ranks
        used = self.entry.resolve(config.profile)
        wanted = config.protocols or (DEFAULT_PROTOCOL[self.entry.kind],)
        protocols_here: list[Protocol] = [
            one for one in REQUIRED_SPLITS if one in wanted and one in ALLOWED[self.entry.kind]
        ]
        needed = sorted({split for one in protocols_here for split in REQUIRED_SPLITS[one]})
        opened: dict[str, Samples] = {}
        problems: dict[str, str] = {}
        for split in needed:
            if problem := run_on_all_ranks(ranks, lambda split=split: self._open(split, opened)):
                problems[split] = problem
        if "test" in problems:
            self._refuse("", problems["test"])
        if not protocols_here or "test" in problems:
            return
        settings: dict[Protocol, Mapping[str, Any]] = {one: self._settings(one, used, opened) for one in protocols_here}
        done, pending = self._look(settings)
        splits: dict[str, Split] = {}
        for split in (split for split in needed if split in opened and split not in problems):
            if any(split in REQUIRED_SPLITS[one] for one in pending) and (
                problem := self._prepare(used, split, opened, splits)
            ):
                problems[split] = problem
        earlier = dict(done)
        for one in pending:
            if trouble := next(
                (f"{split}: {problems[split]}" for split in REQUIRED_SPLITS[one] if split in problems), ""
            ):
                self._refuse(one, trouble)
            elif ranks.is_first:
                self._try(one, used, splits, earlier, settings[one])
        self.results = [earlier[one] for one in protocols_here if one in earlier]
        self.resumed = len(done)

    def _try(
        self,
        protocol: Protocol,
        used: ResolvedDataset,
        splits: Mapping[str, Split],
        earlier: dict[Protocol, Result],
        settings: Mapping[str, Any],
    ) -> None:
        """Measure, and put the result to the others; or refuse."""
        task = Task(
            config=self.config,
            model=self.model.name,
            logit_scale=self.model.logit_scale,
            embed_texts=self.model.embed_texts,
            used=used,
            splits=splits,
            earlier=earlier,
        )
        try:
            earlier[protocol] = self._measure(protocol, task, settings)
        except (DatasetError, UsageError, NotFoundError) as error:
            self._refuse(protocol, str(error))

    def _open(self, split: str, opened: dict[str, Samples]) -> None:
        """Open a split; one that is not there is a problem only if it is the test split."""
        try:
            opened[split] = open_samples(self.place, self.root, split, self.entry.kind)
        except NotFoundError:
            if split == "test":
                raise

    def _settings(self, protocol: Protocol, used: ResolvedDataset, opened: Mapping[str, Samples]) -> dict[str, Any]:
        """What a result depends on; as JSON would give it back."""
        config = self.config
        data = {split: opened[split].fingerprint for split in REQUIRED_SPLITS[protocol] if split in opened}
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
        if protocol in ("probe", "fewshot") and "train" not in data:  # a shift's is ImageNet's
            path = probe_of_imagenet(config.out, self.model.name, protocol)
            settings["probe"] = files.xxh3(path) if path.is_file() else ""
        elif protocol == "fewshot":
            settings |= {"shots": list(config.shots), "seeds": config.seeds}
        if protocol == "overlap" and config.overlap is not None:
            settings["overlap"] = files.digest(repr(read_overlap(config.overlap)))
        return settings

    def _look(self, settings: Mapping[Protocol, Mapping[str, Any]]) -> tuple[dict[Protocol, Result], list[Protocol]]:
        """Which protocols are done, and which are to be done; the first rank decides."""
        config = self.config
        done: dict[Protocol, Result] = {}
        problem = ""
        for one in settings if self.ranks.is_first else ():
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
                    other = sorted(
                        {SETTING_LABELS.get(k, str(k)) for k in keys if settings[one].get(k) != before.get(k)}
                    )
                    problem = (
                        f"{path} was made with other settings: {', '.join(other)}; name another --out, "
                        "or say --redo to make it again"
                    )
            except UsageError as error:
                problem = "" if config.redo else str(error)
        if problem := self.ranks.broadcast(problem):
            raise UsageError(problem)
        done = self.ranks.broadcast(done)
        return done, [one for one in settings if one not in done]

    def _prepare(
        self, used: ResolvedDataset, split: str, opened: Mapping[str, Samples], splits: dict[str, Split]
    ) -> str:
        """Number the labels of a split and embed its pictures; or why that cannot be."""
        samples, done = opened[split], 0

        def check() -> None:
            splits[split] = self._check(used, split, samples)

        def tell(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                name, total = self.entry.id, len(samples)
                self.on_progress(
                    EvaluateProgress(model=self.model.name, dataset=name, split=split, done=done, total=total)
                )

        if problem := run_on_all_ranks(self.ranks, check):
            return problem
        try:
            embedded = self.embedder.embed(samples, self.entry.border, tell)
        except DatasetError as error:  # on every rank alike
            return str(error)
        if not embedded.kept:
            return f"no picture can be used ({dict(embedded.skipped)})"
        splits[split] = replace(splits[split], embedded=embedded)
        return ""

    def _check(self, used: ResolvedDataset, split: str, samples: Samples) -> Split:
        """Hold a split against the registry; DatasetError, or warnings if those are enough."""
        numbered = protocols.NO_CLASSES
        if self.entry.kind != "captions":
            numbered = index_labels(used, samples, self.place)
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
        if self.config.on_mismatch == "stop" and (fatal := [text for text, stops in problems if stops]):
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
        self.refused.append(Refused(model=self.model.name, dataset=self.entry.id, protocol=protocol, reason=reason))


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
            return protocols_probe.probe(task)
        case "fewshot":
            return protocols_probe.few_shot(task)
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
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise UsageError(
            f"{path} is no overlap.parquet with a column of keys ({str(error).splitlines()[0]}); give the one that "
            "`diptych curate contamination` wrote"
        ) from None


def save_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz, whole or not there."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())
