"""A run's folder over time: who may write, which checkpoints stay, and their copy elsewhere.

runs/mine/
  step_00001000/      checkpoints: whole or not there (checkpoint/formats/native.py)
  config.json         the run's settings
  metrics.jsonl ...   logs (logs.py)
  .lock               held by the process that trains here
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import fsspec

from diptych import files
from diptych.checkpoint.formats import native
from diptych.errors import CheckpointError, NotFoundError, UsageError
from diptych.train.config import RunConfig


class CheckpointManager:
    """Decides which checkpoints of a run stay, and copies them to the mirror in the background."""

    def __init__(self, out: Path, run: RunConfig) -> None:
        self.out, self.run = out, run
        self.mirror = Mirror(run.mirror) if run.mirror else None
        self.best: tuple[float, int] | None = None
        """Highest value of `keep_best`, and its step."""
        self._saved_at = time.monotonic()

    def is_due(self, step: int, last: int) -> bool:
        """Whether a checkpoint is made by count of steps."""
        return step == last or step % self.run.checkpoint_every == 0

    def is_late(self) -> bool:
        """Whether the last checkpoint is longer ago than it may be."""
        minutes = self.run.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the step if it is the best one so far."""
        if (name := self.run.keep_best) is None:
            return
        if name not in metrics:
            raise UsageError(f"keep_best {name} is not among the metrics of this run: {', '.join(metrics) or 'none'}")
        if self.best is None or metrics[name] > self.best[0]:
            self.best = metrics[name], step

    def saved(self, step: int, logs: list[Path]) -> None:
        """A checkpoint was made: delete those that have had their time, copy this one."""
        self._saved_at = time.monotonic()
        kept = {step} | ({self.best[1]} if self.best else set())
        folders = native.step_folders(self.out)
        gone = [f for f in folders[self.run.keep_last :] if native.step_of(f) not in kept] if self.run.keep_last else []
        for folder in gone:
            files.remove_folder(folder)
        if self.mirror:
            self.mirror.push(native.step_folder(self.out, step), logs, [folder.name for folder in gone])

    def fetch(self) -> list[str]:
        """Fill an empty folder from the mirror with its newest intact checkpoint; what was passed over, and why."""
        if self.mirror is None or native.step_folders(self.out):
            return []
        return self.mirror.fetch(self.out)

    def close(self) -> None:
        """Wait for the mirror; raises what went wrong there."""
        if self.mirror:
            self.mirror.join()


class Mirror:
    """A run's checkpoints at an fsspec URL. A folder's checkpoint.json comes last: without it a copy does not count."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"mirror {url} cannot be used: {error}") from None

    def push(self, folder: Path, logs: list[Path], gone: list[str]) -> None:
        """Copy in the background, one checkpoint after the other."""
        self.join()
        self._thread = threading.Thread(target=self._push, args=(folder, logs, gone), name="diptych-mirror")
        self._thread.start()

    def join(self) -> None:
        """Wait for the copy that is under way; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"the copy to {self.url} failed: {error}; the checkpoints on this machine are whole")

    def fetch(self, out: Path) -> list[str]:
        """Copy the newest intact checkpoint and the logs to `out`."""
        passed_over = []
        names = sorted((self._names(self.root)), reverse=True)
        for name in (name for name in names if native.step_of(Path(name)) is not None):
            with contextlib.suppress(NotFoundError), files.atomic_folder(out / name) as temporary:
                try:
                    for file in self._names(f"{self.root}/{name}"):
                        self.files.get_file(f"{self.root}/{name}/{file}", str(temporary / file))
                    native.read_description(temporary)
                except (CheckpointError, NotFoundError) as error:
                    passed_over.append(f"{self.url}/{name}: {error}")
                    raise NotFoundError(name) from None
            if (out / name).exists():
                for file in (file for file in names if file.endswith((".json", ".jsonl"))):
                    self.files.get_file(f"{self.root}/{file}", str(out / file))
                break
        return passed_over

    def _push(self, folder: Path, logs: list[Path], gone: list[str]) -> None:
        try:
            target = f"{self.root}/{folder.name}"
            self.files.makedirs(target, exist_ok=True)
            last = native.DESCRIPTION
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
                self.files.put_file(str(file), f"{target}/{file.name}")
            for log in logs:
                self.files.put_file(str(log), f"{self.root}/{log.name}")
            for name in gone:
                if self.files.exists(f"{self.root}/{name}"):
                    self.files.rm(f"{self.root}/{name}", recursive=True)
        except Exception as error:  # whatever a file system raises is told at the next checkpoint, not lost
            self._error = error

    def _names(self, folder: str) -> list[str]:
        if not self.files.exists(folder):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in self.files.ls(folder, detail=False)]
