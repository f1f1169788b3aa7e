"""Models x datasets x protocols into a results folder; `Cell` is what is done with one model and one dataset.

Missing datasets are downloaded if that is asked for; datasets that are missing or refused are reported and skipped.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diptych import files
from diptych.embed.cache import FeatureCache
from diptych.errors import DatasetError, DiptychError, NotFoundError, UsageError
from diptych.evaluate.cell import PROTOCOL_SPECS, Cell, OnProgress, Refused, run_on_all_ranks
from diptych.evaluate.config import EvaluateConfig
from diptych.evaluate.datasets.download import can_download, candidates, download, locate, where_to_get
from diptych.evaluate.datasets.layouts import open_samples
from diptych.evaluate.datasets.registry import Dataset, DatasetKind, Place, load_suite
from diptych.evaluate.models.features import Embedder
from diptych.evaluate.models.open import OpenedModel, model_names, open_model
from diptych.evaluate.results import Protocol, Result, save_model
from diptych.model.device import choose_device
from diptych.ranks import Ranks, connect, disconnect, name_lost_ranks

_TIMEOUT = 6 * 3600.0
"""Seconds that ranks wait for the first one while it measures."""


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """Everything that a run found."""

    results: tuple[Result, ...]
    """All results of the suite, earlier ones included."""
    resumed: int
    """Results that were there."""
    missing: Mapping[str, str]
    """Dataset that is not there -> where it can be had."""
    refused: tuple[Refused, ...]
    unfit: Mapping[str, str]
    """Protocol that was asked for and none of the datasets is for -> the kinds of dataset that it is for."""
    out: Path
    seconds: float


def run(config: EvaluateConfig, *, on_progress: OnProgress | None = None) -> EvaluateReport:
    """Evaluate; raises NotFoundError if none of the datasets is there."""
    ranks = connect(_TIMEOUT, config.device)
    try:
        with name_lost_ranks(ranks), _hold(config.out, ranks):
            return _Run(config, ranks, on_progress).run()
    finally:
        disconnect(ranks)


def _hold(out: Path, ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """Two jobs may fill one folder, not at once; the first rank holds it for its job."""
    return files.hold_folder(out) if ranks.is_first else contextlib.nullcontext()


def unfit_protocols(protocols: Sequence[Protocol], kinds: Sequence[DatasetKind]) -> dict[str, str]:
    """Protocols that are for none of these kinds of dataset, and the kinds that they are for."""
    fitting = {one: PROTOCOL_SPECS[one].kinds for one in protocols}
    return {one: ", ".join(fit) for one, fit in fitting.items() if not {*fit} & {*kinds}}


def _is_whole(entry: Dataset, place: tuple[Place, Path] | None) -> bool:
    """Whether a dataset is there, and not the part of a transfer that broke off."""
    try:
        return place is not None and len(open_samples(*place, "test", entry.kind)) > 0
    except (DatasetError, NotFoundError):
        return False


@dataclass
class _Run:
    config: EvaluateConfig
    ranks: Ranks
    on_progress: OnProgress | None
    results: list[Result] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    resumed: int = 0

    def run(self) -> EvaluateReport:
        started = time.monotonic()
        choose_device(self.config.device, self.ranks)  # before data are looked for
        names = model_names(self.config.models)
        datasets = load_suite(self.config.suite)
        self._check_overlap(datasets)
        places = self._find(datasets)
        cache = FeatureCache(self.config.cache or self.config.out / ".features", self.config.cache_bytes)
        try:
            for name, source in names.items():
                self._run_model(open_model(name, source, self.config, cache, self.ranks), datasets, places, cache)
        finally:
            cache.close()
        return EvaluateReport(
            results=tuple(self.results),
            resumed=self.resumed,
            missing=self.missing,
            refused=tuple(self.refused),
            unfit=unfit_protocols(self.config.protocols, [entry.kind for entry in datasets if entry.id in places]),
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
            if self.config.download and can_download(entry) and not _is_whole(entry, place):
                _, problem = run_on_all_ranks(self.ranks, lambda entry=entry: self._download(entry), only_first=True)
                if problem:
                    self.missing[entry.id] = f"{where_to_get(entry)} ({problem})"
                    continue
                place = locate(entry, self.config.data)
            if place is None:
                self.missing[entry.id] = where_to_get(entry)
            else:
                found[entry.id] = place
        if not found:
            raise NotFoundError(self._why_nothing(datasets))
        return found

    def _why_nothing(self, datasets: Sequence[Dataset]) -> str:
        """None of the datasets is there: where they were looked for, and where they can be had."""
        lines = "".join(f"\n  {name}: {where}" for name, where in self.missing.items())
        looked = [path for entry in datasets if entry.data is None for path in candidates(entry, self.config.data)]
        where = f" in {self.config.data} (looked for {', '.join(map(str, looked[:2]))}, ...)" if looked else " there"
        hint = ""
        if self.config.download:
            hint = "; nothing could be fetched"
        elif any(can_download(entry) for entry in datasets):
            hint = "; --download fetches what has a repository"
        none = "the dataset is not" if len(datasets) == 1 else f"none of the {len(datasets)} datasets is"
        return f"{none}{where}{hint}:{lines}"

    def _download(self, entry: Dataset) -> None:
        download(entry, self.config.data, "test")
        for protocol in self.config.protocols:
            for split in PROTOCOL_SPECS[protocol].splits[1:]:
                with contextlib.suppress(DiptychError):
                    download(entry, self.config.data, split)

    def _run_model(
        self,
        model: OpenedModel,
        datasets: Sequence[Dataset],
        places: Mapping[str, tuple[Place, Path]],
        cache: FeatureCache,
    ) -> None:
        if self.ranks.is_first:
            save_model(self.config.out, model.facts)
        embedder = Embedder(model.images, cache, self.config.batch_size, self.ranks)
        for entry in datasets:
            if entry.id in places:
                cell = Cell(self.config, self.ranks, model, embedder, entry, *places[entry.id], self.on_progress)
                report = cell.run()
                self.results += report.results
                self.resumed += report.resumed
                self.refused += report.refused
