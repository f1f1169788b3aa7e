"""One model on one dataset: opened, checked, embedded once, measured by each protocol, written.

A protocol whose file is there with the same settings is done; with other settings that is an error, unless it is to be
done again. What cannot be evaluated is refused with a reason. Ranks of a job share the pictures; the first one measures
and writes.
"""

import datetime
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import diptych
from diptych import files
from diptych.errors import DatasetError, DiptychError, NotFoundError, UsageError
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.labels import NO_CLASSES, align_classes, index_labels
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Dataset, Place, ResolvedDataset
from diptych.evaluate.datasets.samples import Samples
from diptych.evaluate.models.features import Embedder
from diptych.evaluate.models.open import OpenedModel
from diptych.evaluate.protocols import fewshot, overlap, probe, prompts, retrieval, temporal, zeroshot
from diptych.evaluate.protocols.task import NOTHING, Arrays, ProtocolSpec, Split, Task
from diptych.evaluate.results import Protocol, Result, load_result, result_path, save_result
from diptych.ranks import Ranks
from diptych.tokenizer import clean

VERSION = 2
"""Version of what is measured: a higher one does not take up results of a lower one."""
PROTOCOL_SPECS: Mapping[Protocol, ProtocolSpec] = {
    "zeroshot": zeroshot.SPEC,
    "prompts": prompts.SPEC,
    "retrieval": retrieval.SPEC,
    "temporal": temporal.SPEC,
    "overlap": overlap.SPEC,
    "probe": probe.SPEC,
    "fewshot": fewshot.SPEC,
}
"""All that `diptych evaluate` measures, in the order in which it does: later ones look at the results of earlier ones.
The first that is for a kind of dataset is that kind's default."""
SETTING_LABELS: dict[str, str] = {
    "version": "an older version of diptych",
    "names": "class names",
    "data": "files or labels of the dataset",
    "images": "model or precision",
    "texts": "model or precision",
    "probe": "ImageNet's probe",
}
"""Names of settings that are not options, for messages."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A protocol that could not be measured, and why."""

    model: str
    dataset: str
    protocol: str
    """Empty: none of them."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class EvaluateProgress:
    """How far the images of a split are embedded."""

    model: str
    dataset: str
    split: str
    done: int
    total: int


OnProgress = Callable[[EvaluateProgress], None]
Value = TypeVar("Value")


def run_on_all_ranks(ranks: Ranks, work: Callable[[], Value], *, only_first: bool = False) -> tuple[Value | None, str]:
    """Do something on every rank, or on the first: what came of it here, and what went wrong on any rank."""
    value, problem = None, ""
    try:
        if ranks.is_first or not only_first:
            value = work()
    except DiptychError as error:
        problem = str(error)
    return value, next((text for text in ranks.gather_objects(problem) if text), "")


@dataclass(frozen=True, kw_only=True)
class CellReport:
    """Outcomes of one model on one dataset."""

    results: tuple[Result, ...] = ()
    """Results of the protocols, in order, earlier ones included."""
    resumed: int = 0
    """Results that were there."""
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One model and one dataset."""

    config: EvaluateConfig
    ranks: Ranks
    model: OpenedModel
    embedder: Embedder
    entry: Dataset
    place: Place
    """Where the dataset lies; its path counts from `root`."""
    root: Path
    on_progress: OnProgress | None = None

    def run(self) -> CellReport:
        """Measure what is not done."""
        fitting: list[Protocol] = [one for one, spec in PROTOCOL_SPECS.items() if self.entry.kind in spec.kinds]
        asked = self.config.protocols or fitting[:1]
        wanted: list[Protocol] = [one for one in fitting if one in asked]
        needed = sorted({split for one in wanted for split in PROTOCOL_SPECS[one].splits})
        opened, problems = self._open(needed)
        if "test" in problems:
            return CellReport(refused=(self._refuse("", problems["test"]),))
        used = self.entry.resolve(self.config.profile)
        if self.model.templates and not used.has_templates:
            used = replace(used, templates=self.model.templates)
        settings: dict[Protocol, dict[str, Any]] = {one: self._settings(one, used, opened) for one in wanted}
        done = self._find_done(settings)
        pending: list[Protocol] = [one for one in wanted if one not in done]
        looked_at = {split for one in pending for split in PROTOCOL_SPECS[one].splits}
        splits, unusable = self._embed(used, {split: one for split, one in opened.items() if split in looked_at})
        problems |= unusable
        results, refused = dict(done), []
        for one in pending:
            faults = [f"{split}: {problems[split]}" for split in PROTOCOL_SPECS[one].splits if split in problems]
            if faults:
                refused.append(self._refuse(one, faults[0]))
            elif self.ranks.is_first:
                try:
                    results[one] = self._measure(one, used, splits, dict(results), settings[one])
                except (DatasetError, UsageError, NotFoundError) as error:
                    refused.append(self._refuse(one, str(error)))
        in_order = tuple(results[one] for one in wanted if one in results)
        return CellReport(results=in_order, resumed=len(done), refused=tuple(refused))

    def _refuse(self, protocol: str, reason: str) -> Refused:
        return Refused(model=self.model.name, dataset=self.entry.id, protocol=protocol, reason=reason)

    def _open(self, splits: Sequence[str]) -> tuple[dict[str, Samples], dict[str, str]]:
        """Open splits: those that are there, and the problems of others. Only the test split has to be there."""
        opened, problems = {}, {}
        for split in splits:
            samples, problem = run_on_all_ranks(self.ranks, lambda split=split: self._open_split(split))
            if problem:
                problems[split] = problem
            elif samples is not None:
                opened[split] = samples
        return opened, problems

    def _open_split(self, split: str) -> Samples | None:
        try:
            return open_samples(self.place, self.root, split, self.entry.kind)
        except NotFoundError:
            if split == "test":
                raise
            return None

    def _settings(self, protocol: Protocol, used: ResolvedDataset, opened: Mapping[str, Samples]) -> dict[str, Any]:
        """Everything that a result depends on, as JSON gives it back."""
        config = self.config
        data = {split: opened[split].fingerprint for split in PROTOCOL_SPECS[protocol].splits if split in opened}
        settings: dict[str, Any] = {
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
        return settings | PROTOCOL_SPECS[protocol].settings(config, self.model.name, opened)

    def _find_done(self, settings: Mapping[Protocol, Mapping[str, Any]]) -> dict[Protocol, Result]:
        """Results that are there with the same settings, on every rank as the first one finds them; UsageError for one
        with other settings, unless it is to be made again."""
        done, problem = run_on_all_ranks(self.ranks, lambda: self._load_done(settings), only_first=True)
        if problem:
            raise UsageError(problem)
        return self.ranks.broadcast(done)

    def _load_done(self, settings: Mapping[Protocol, Mapping[str, Any]]) -> dict[Protocol, Result]:
        done: dict[Protocol, Result] = {}
        for one, now in settings.items():
            path = result_path(self.config.out, self.model.name, self.entry.id, one)
            if not path.is_file():
                continue
            try:
                result = load_result(path)
            except UsageError:
                if self.config.redo:
                    continue
                raise
            before = result.about.get("settings", {})
            if before == now:
                done[one] = result
            elif not self.config.redo:
                differing = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
                names = sorted({SETTING_LABELS.get(key, str(key)) for key in differing})
                raise UsageError(
                    f"{path} was made with other settings: {', '.join(names)}; name another --out, "
                    "or say --redo to make it again"
                )
        return done

    def _embed(self, used: ResolvedDataset, opened: Mapping[str, Samples]) -> tuple[dict[str, Split], dict[str, str]]:
        """Check splits and embed their images: those that can be used, and the problems of others."""
        splits, problems = {}, {}
        for name, samples in opened.items():
            split, problem = run_on_all_ranks(
                self.ranks, lambda name=name, samples=samples: self._check(used, name, samples, splits.get("test"))
            )
            if split is None or problem:
                problems[name] = problem
                continue
            try:
                embedded = self.embedder.embed(samples, self.entry.border, self._tell(name, len(samples)))
            except DatasetError as error:  # on every rank alike
                problems[name] = str(error)
                continue
            if embedded.kept:
                splits[name] = replace(split, embedded=embedded)
            else:
                counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(embedded.skipped.items()))
                problems[name] = f"no picture can be used ({counts})"
        return splits, problems

    def _tell(self, split: str, total: int) -> Callable[[int], None]:
        """A function that counts images up to `total` and tells of it."""
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                model, dataset = self.model.name, self.entry.id
                self.on_progress(EvaluateProgress(model=model, dataset=dataset, split=split, done=done, total=total))

        return tell

    def _check(self, used: ResolvedDataset, split: str, samples: Samples, test: Split | None) -> Split:
        """Hold a split against the registry, and its classes against those of the test split; DatasetError, or warnings
        if those are enough."""
        numbered = NO_CLASSES
        if self.entry.kind != "captions":
            numbered = index_labels(used, samples, self.place)
            if test is not None:
                numbered = align_classes(numbered, test.numbered, split)
        problems = []
        read = Counter(clean(names[0]) for names in numbered.names)  # as models read them: `Cat` is `cat`
        if repeated := [name for name, times in read.items() if times > 1]:
            problems.append(
                (f"several classes are called {', '.join(repeated[:5])}: only one can be recognised", False)
            )
        if samples.passed_over:
            counts = ", ".join(f"{suffix or 'no suffix'} {n:,}" for suffix, n in sorted(samples.passed_over.items()))
            problems.append((f"files of {split} that were not taken for pictures: {counts}", False))
        try:
            used.expect(split, len(samples) + samples.skipped.total())
        except DatasetError as error:
            problems.append((str(error), self.entry.split_published))
        present = {number for several in numbered.numbers for number in several}
        if absent := [names[0] for number, names in enumerate(numbered.names) if number not in present]:
            named = ", ".join([*absent[:5], *(["..."] if len(absent) > 5 else [])])
            said = f"{len(absent)} of {len(numbered.names)} classes have no picture in {split}: {named}"
            known = self.entry.split_published and used.splits.get(split) is not None and self.entry.kind == "single"
            problems.append((f"{self.entry.id}: {said}", known))
        if self.config.on_mismatch == "stop" and (fatal := [text for text, stops in problems if stops]):
            raise DatasetError("; ".join(fatal) + "; --on-mismatch warn evaluates it all the same")
        return Split(
            samples=samples,
            numbered=numbered,
            embedded=NOTHING,
            warnings=tuple(text for text, _ in problems),
        )

    def _measure(
        self,
        protocol: Protocol,
        used: ResolvedDataset,
        splits: Mapping[str, Split],
        earlier: Mapping[Protocol, Result],
        settings: Mapping[str, Any],
    ) -> Result:
        """Measure one protocol and write its result."""
        task = Task(
            config=self.config,
            model=self.model.name,
            logit_scale=self.model.logit_scale,
            embed_texts=self.model.embed_texts,
            used=used,
            splits=splits,
            earlier=earlier,
        )
        started = time.monotonic()
        result, arrays = PROTOCOL_SPECS[protocol].measure(task)
        if "train" in PROTOCOL_SPECS[protocol].splits and (same := count_shared(splits)):
            said = f"{same:,} of {len(task.test.embedded.kept):,} pictures of test are in train too"
            result = replace(result, warnings=(said, *result.warnings))
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
        path = result_path(self.config.out, result.model, result.dataset, protocol)
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrays:
            save_arrays(path.with_suffix(".npz"), arrays)  # before the result, whose file says that all is there
        save_result(self.config.out, result)
        return load_result(path)


def count_shared(splits: Mapping[str, Split]) -> int:
    """How many pictures of the test split have the very features of one of the training split: they are the same."""
    if "train" not in splits:
        return 0
    train = {row.tobytes() for row in splits["train"].embedded.pooled.numpy()}
    return sum(row.tobytes() in train for row in splits["test"].embedded.pooled.numpy())


def save_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz, whole or not there."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())
