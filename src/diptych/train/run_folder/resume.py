"""The check that a run in a folder may be continued with the settings that are given."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from diptych import files
from diptych.config import from_dict, to_dict
from diptych.errors import CheckpointError, UsageError
from diptych.train.config import TrainConfig


def read_settings(path: Path) -> Any:
    """The config.json of a run; CheckpointError where it is gone or damaged, since nobody may guess here."""
    try:
        settings = files.read_json(path)
        if not isinstance(settings, dict):
            raise ValueError("it is no table of settings")
        return settings
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}), so the settings of the run are not "
            "known; put it back from a copy, or name another --out and finetune the newest checkpoint"
        ) from None


def require_same_run(stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder; fields that do not change the result (MAY_CHANGE) may differ.

    So may the number of ranks, which is in no config.
    """
    theirs, ours = to_dict(_adopt(from_dict(TrainConfig, stored), config)), to_dict(config)
    changed = sorted(name for name in ours if ours[name] != theirs[name])
    if changed:
        had, wanted = theirs["run"]["steps"], ours["run"]["steps"]
        more = f"; --steps {had} --extend-to {wanted} goes on to there" if had and wanted and had < wanted else ""
        details = "; ".join(f"{name}: {_difference(theirs[name], ours[name])}" for name in changed)
        raise UsageError(
            f"{config.out} holds a run with other settings ({details}); repeat them to continue, or name another "
            f"out{more}"
        )


def _adopt(theirs: Any, ours: Any) -> Any:
    """One config with what may change from another of its class."""
    values = {}
    for field in fields(ours):
        before, now = getattr(theirs, field.name), getattr(ours, field.name)
        if field.metadata.get("may_change"):
            values[field.name] = now
        elif is_dataclass(now) and type(before) is type(now):
            values[field.name] = _adopt(before, now)
    return replace(theirs, **values)


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        return ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
    return f"{theirs} there, {ours} here"
