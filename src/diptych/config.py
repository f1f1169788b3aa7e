"""Frozen configs to JSON and back, into the same class.

Every stage has a frozen, keyword-only dataclass as its config. It is saved beside what the stage made and read back
here; a key that the class does not know is an error, never ignored. Where a field may hold one of several classes
(a ViT or a ResNet), the JSON names the class under "type"; without it, it is the first.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diptych.errors import UsageError, unknown_name

Config = TypeVar("Config")

MAY_CHANGE = {"may_change": True}
"""Metadata of a field that may differ when an unfinished run is continued: it does not change the result."""

LATER = {"later": True}
"""Metadata of a field that came later: left out where it has its default, so that what was written stays equal."""


FIRST_UNNAMED = {"first_unnamed": True}
"""Metadata of a field that came to hold several classes later: the first of them is not named, as it was not before."""


def to_dict(config: object) -> dict[str, Any]:
    """Turn a config into plain JSON values."""
    hints = typing.get_type_hints(type(config))
    found = [(f, getattr(config, f.name)) for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    told = [(f.name, value) for f, value in found if not (f.metadata.get("later") and value == f.default)]
    encoded = {name: _encode(hints[name], value) for name, value in told}
    for f, value in found:
        if f.metadata.get("first_unnamed") and type(value) is next(iter(_dataclasses_in(hints[f.name]).values())):
            del encoded[f.name]["type"]
    return encoded


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Build a config of class `cls` from plain JSON values; raises UsageError on a key it does not know or misses and
    on a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise unknown_name(f"key in {cls.__name__}", key, names)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in data:
            raise UsageError(f"{cls.__name__} needs {f.name}, which is not given")
    return cls(**{key: _decode(hints[key], value) for key, value in data.items()})


def _encode(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        tag = {"type": type(value).__name__} if len(_dataclasses_in(hint)) > 1 else {}
        return tag | to_dict(value)
    if isinstance(value, (tuple, list)):
        item_hint = (typing.get_args(hint) or (Any,))[0]
        return [_encode(item_hint, item) for item in value]
    if isinstance(value, str):
        return hide_secrets(value)  # it is written into files that are shown around
    return str(value) if isinstance(value, Path) else value


def _decode(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    classes = _dataclasses_in(hint)
    if classes and isinstance(value, Mapping):
        fields = dict(value)
        if len(classes) == 1:
            return from_dict(next(iter(classes.values())), fields)
        name = fields.pop("type", next(iter(classes)))
        if not isinstance(name, str) or name not in classes:
            raise unknown_name("config type", str(name), classes)
        return from_dict(classes[name], fields)
    for option in options:
        if option is Path and isinstance(value, str):
            return Path(value)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return _decode_tuple(typing.get_args(option), value)
        if option is float and type(value) is int and abs(value) < 1 << 53:
            return float(value)
        if _fits(option, value):
            return value
    raise UsageError(f"{str(value)[:80]!r} is not one of the values that {hint} allows")


def _decode_tuple(hints: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    if hints[-1] is ...:
        return tuple(_decode(hints[0], value) for value in values)
    if len(hints) != len(values):
        raise UsageError(f"{len(values)} values where {len(hints)} are needed")
    return tuple(_decode(hint, value) for hint, value in zip(hints, values, strict=True))


def _fits(hint: Any, value: Any) -> bool:
    """Whether a plain JSON value is of a plain type; true is no number, nor is what no machine counts with."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint) and not isinstance(value, float)
    return hint is Any or (type(value) is hint and not (type(value) is int and abs(value) >= 1 << 64))


def _dataclasses_in(hint: Any) -> dict[str, type]:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return {option.__name__: option for option in options if dataclasses.is_dataclass(option)}  # type: ignore[misc]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


_SECRETS = re.compile(
    r"(?<=://)[^/@\s:]*:[^/@\s]*(?=@)|(?<=[?&](?:sig|key)=)[^&\s]+|(?<=[?&]token=)[^&\s]+|(?<=Signature=)[^&\s]+"
)


def hide_secrets(text: str) -> str:
    """A text without the passwords and tokens of the URLs in it.

    >>> hide_secrets("s3://me:secret@host/a?x=1&token=abc")
    's3://***@host/a?x=1&token=***'
    """
    return _SECRETS.sub("***", text) if "://" in text else text


def require_finite(config: Any) -> None:
    """Raise UsageError for a setting, or one of a config inside, that is NaN or infinite."""
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            require_finite(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} {value} is no number that can be used")
