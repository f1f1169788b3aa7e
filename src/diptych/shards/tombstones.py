"""Samples that were deleted from a dataset after it was written: `tombstones.json` beside its shards names their keys.

Whoever reads the dataset leaves them out; their bytes stay until the shards are written anew (`diptych curate delete
--compact`). The order of the rest does not change, so a run that is under way goes on; it sees the deletion when it is
started the next time.
"""

from collections.abc import Iterable
from pathlib import Path

from diptych import files
from diptych.errors import ShardError

TOMBSTONES_FILE = "tombstones.json"
TOMBSTONES_VERSION = 1
DELETED = "deleted"
"""The reason with which a deleted sample is left out."""


def parse_tombstones(text: bytes, place: str) -> frozenset[str]:
    """Read the content of a tombstones file; raises ShardError if that cannot be done, since nobody may guess here."""
    try:
        content = files.parse_json(text)
        if content["version"] != TOMBSTONES_VERSION:
            raise ShardError(f"{place} has version {content['version']}, not {TOMBSTONES_VERSION}")
        keys = content["keys"]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise TypeError("keys is not a list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{place} is damaged ({error!r}), so what was deleted is not known; put it back from a copy, or delete "
            "those samples again"
        ) from None
    return frozenset(keys)


def read_tombstones(folder: Path) -> frozenset[str]:
    """Keys that were deleted from the dataset in a folder."""
    path = folder / TOMBSTONES_FILE
    return parse_tombstones(path.read_bytes(), str(path)) if path.exists() else frozenset()


def write_tombstones(folder: Path, keys: Iterable[str]) -> None:
    """Replace the tombstones of a folder."""
    content = {"format": "diptych tombstones", "version": TOMBSTONES_VERSION, "keys": sorted(set(keys))}
    files.write_json(folder / TOMBSTONES_FILE, content)
