"""The exceptions someone catches, drawn as a tree.

    DiptychError
    ├── UsageError (ValueError)            a wrong argument: what was given, what is allowed, what to do
    │   └── ActivationUnknownError         weights that do not show which activation they were trained with
    ├── NotFoundError (FileNotFoundError)  a path that is not there
    ├── PictureError                       bytes that are not a usable picture; carries a counted `reason`
    ├── ShardError                         a shard, index or dataset.json that cannot be read
    ├── DatasetError                       a set of pictures that is not what the registry says, or damaged
    ├── CheckpointError                    a checkpoint that is damaged or belongs to another model
    ├── DownloadError                      weights that could not be fetched
    ├── RunLockedError                     another process is training in this folder
    ├── RankLostError                      another process of the job died or did not answer in time
    ├── TaskLostError                      a task ended its process again and again
    └── NonFiniteLossError                 training stopped before the optimizer step

The command line prints any of these as one line and exits with code 2; all else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class DiptychError(Exception):
    """Root of every exception that `diptych` raises on purpose."""


class UsageError(DiptychError, ValueError):
    """The caller asked for something that cannot be done; the message says what can."""


class ActivationUnknownError(UsageError):
    """Nothing shows which activation these weights were trained with; the caller has to say."""


class NotFoundError(DiptychError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    def __str__(self) -> str:  # OSError would print its arguments as a tuple
        return str(self.args[0])


PASSING = frozenset({"unreadable", "out_of_memory"})
"""Reasons of `PictureError` that are faults of the machine."""


class PictureWarning(UserWarning):
    """Pictures are used, but not seen as their owner sees them."""


class PictureError(DiptychError):
    """The bytes are not a picture that can be used.

    `reason` is one short word, of a picture from `diptych.decode.REASONS`: it is counted, printed and stored. Rows of
    tables and texts have some of their own (`diptych.embed.sources`), and curation has (`diptych.curate.images`).
    """

    @property
    def passes(self) -> bool:
        """Whether the fault is the machine's, so that another try may succeed: it is counted, never remembered."""
        return self.reason in PASSING

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def of(self, name: str) -> "PictureError":
        """This error, with the name of the picture in its message."""
        return self if name in self.detail else type(self)(self.reason, f"{name}: {self.detail}")

    def without_frames(self) -> "PictureError":
        """This error, to be kept: frames hold the picture, and in circles that are collected late."""
        error: BaseException | None = self
        while error is not None:
            error.__traceback__, error = None, error.__context__
        return self

    def __reduce__(self) -> tuple[type["PictureError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)  # it crosses process borders


class ShardError(DiptychError):
    """A shard, its index or its dataset.json is missing, damaged or contradicts the others."""


class DatasetError(DiptychError):
    """An evaluation set is damaged or is not what the registry says; the message says in what."""


class CheckpointError(DiptychError):
    """A checkpoint is incomplete, damaged, or was made by another model or run."""


class DownloadError(DiptychError):
    """Weights could not be fetched: the network, the hub or the disk; the message names the repository."""


class RunLockedError(DiptychError):
    """Another process holds this run; two would overwrite each other."""


class RankLostError(DiptychError):
    """Another process of the job died or did not answer in time; the run goes on from its last checkpoint."""


class TaskLostError(DiptychError):
    """A task of a stage ended the process that worked at it, more than once; the message names it."""


class NonFiniteLossError(DiptychError):
    """The loss is NaN or infinite; the weights were not touched by this step."""


def install(extra: str) -> str:
    """What to type for the packages of an extra: in a checkout, since no index has this package.

    >>> install("heic")
    "pip install '.[heic]'"
    """
    return f"pip install '.[{extra}]'"


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> UsageError:
    """Build the error for a name that does not exist, with the nearest ones that do.

    >>> str(unknown_name("preset", "ViT-B32", ["RN50", "ViT-B-32"]))
    "unknown preset 'ViT-B32'; did you mean ViT-B-32? Known: RN50, ViT-B-32"
    """
    names, given = sorted(allowed), given[:100]  # it may be what a damaged file holds
    folded = {name.casefold(): name for name in names}
    near = [folded[match] for match in difflib.get_close_matches(given.casefold(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"unknown {kind} {given!r}; {hint}{'Known' if near else 'known'}: {', '.join(names)}")
