"""Frozen configs to JSON and back, into the same class.

Every stage has a frozen, keyword-only dataclass as its config. It is saved beside what the stage made and read back
here; a key that the class does not know is an error, never ignored. Where a field may hold one of several classes
(a ViT or a ResNet), the JSON names the class under "type".
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diptych.errors import UsageError, unknown_name

Config = TypeVar("Config")


def to_dict(config: object) -> dict[str, Any]:
    """Turn a config into plain JSON values."""
    hints = typing.get_type_hints(type(config))
    return {f.name: _encode(hints[f.name], getattr(config, f.name)) for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Build a config of class `cls` from plain JSON values; raises UsageError on a key it does not know."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise unknown_name(f"key in {cls.__name__}", key, names)
    return cls(**{key: _decode(hints[key], value) for key, value in data.items()})


def _encode(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        tag = {"type": type(value).__name__} if len(_dataclasses_in(hint)) > 1 else {}
        return tag | to_dict(value)
    if isinstance(value, (tuple, list)):
        item_hint = (typing.get_args(hint) or (Any,))[0]
        return [_encode(item_hint, item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _decode(hint: Any, value: Any) -> Any:
    classes = _dataclasses_in(hint)
    if classes and isinstance(value, Mapping):
        fields = dict(value)
        if len(classes) == 1:
            return from_dict(next(iter(classes.values())), fields)
        name = fields.pop("type", None)
        if name not in classes:
            raise unknown_name("config type", str(name), classes)
        return from_dict(classes[name], fields)
    if typing.get_origin(hint) is tuple:
        item_hint = typing.get_args(hint)[0]
        return tuple(_decode(item_hint, item) for item in value)
    if value is not None and Path in (hint, *typing.get_args(hint)):
        return Path(value)
    if _is_union(hint) and isinstance(value, list):
        raise UsageError(f"a list is not one of the values that {hint} allows")
    return value


def _dataclasses_in(hint: Any) -> dict[str, type]:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return {option.__name__: option for option in options if dataclasses.is_dataclass(option)}  # type: ignore[misc]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
