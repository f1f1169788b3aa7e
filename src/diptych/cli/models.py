"""`diptych models`."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diptych.errors import NotFoundError, UsageError
from diptych.model.config import PRESETS

if TYPE_CHECKING:
    from diptych.checkpoint.sources import Published

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the published weights that have a name, and the architectures that `diptych train` knows.

    Example: diptych models siglip --max-parameters 500M
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORD")] = ()
    """Only those whose name, family or repository hold all these words: `diptych models siglip 384`."""
    max_parameters: str | None = None
    """Only those with at most so many numbers: 200M, 1.5B."""
    language: str | None = None
    """Only those trained on captions of this language (ko, German): English, or a hundred languages and more."""
    loadable: bool = False
    """Only those that this version of diptych loads."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __call__(self) -> int:
        from diptych.checkpoint.layouts import why_not_published
        from diptych.checkpoint.sources import load_published

        most = None if self.max_parameters is None else parse_count(self.max_parameters)
        found: list[tuple[Published, str | None]] = [
            (one, why_not_published(one))
            for one in load_published().values()
            if self._names(f"{one.name} {one.family} {one.repository}")
            and (most is None or one.parameters <= most)
            and (self.language is None or one.languages > 1 or self.language.casefold() in ("en", "english"))
        ]
        if self.loadable:
            found = [(one, reason) for one, reason in found if reason is None]
        # A preset has no weights, hence no language.
        presets = {
            name: count
            for name, count in _count_presets()
            if self._names(f"{name} preset") and (most is None or count <= most) and self.language is None
        }
        if not found and not presets:
            raise NotFoundError("no model is like this; `diptych models` without words lists them all")
        if self.json:
            rows = [_describe(one, reason) for one, reason in found]
            print(json.dumps({"published": rows, "presets": presets}, indent=2, ensure_ascii=False))
        else:
            print_models(found, presets)
        return 0

    def _names(self, text: str) -> bool:
        """Whether all words stand in a text, signs and case aside: siglip2 is SigLIP 2."""
        return all(_fold(word) in _fold(text) for word in self.words)


def parse_count(text: str) -> float:
    """200M, 1.5B or 12345.

    >>> parse_count("1.5B")
    1500000000.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBG]?)", text.upper())
    if match is None:
        raise UsageError(f"--max-parameters {text} is no number; write 200M or 1.5B")
    return float(match[1]) * _UNITS[match[2]]


def format_count(count: int) -> str:
    """A number of parameters in three or four signs.

    >>> format_count(151277313), format_count(2539567362)
    ('151M', '2.54B')
    """
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def print_models(found: "list[tuple[Published, str | None]]", presets: dict[str, int]) -> None:
    """A line a model, in columns: published ones with the reason why they cannot be loaded, if there is one."""
    if found:
        rows = [("name", "family", "px", "languages", "parameters", "loads", "where it lies")]
        rows += [
            (
                one.name,
                one.family,
                str(one.image_size),
                "en" if one.languages == 1 else f"{one.languages}+",
                format_count(one.parameters),
                "yes" if reason is None else "no",
                str(one.repository or one.url),
            )
            for one, reason in found
        ]
        _print_columns(rows)
        loads = sum(reason is None for _, reason in found)
        print(f"{len(found)} published, {loads} of them load; licences: --json, and the page of each repository")
    if presets:
        print("\narchitectures that can be trained:" if found else "architectures that can be trained:")
        _print_columns([(name, format_count(count)) for name, count in presets.items()])


def _print_columns(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _describe(one: "Published", reason: str | None) -> dict[str, Any]:
    facts = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    more = {"image_size": one.image_size, "context_length": one.context_length, "tokenizer": one.tokenizer}
    return {name: value for name, value in {**facts, **more}.items() if value is not None} | {
        "loads": reason is None,
        **({} if reason is None else {"why_not": reason}),
    }


def _count_presets() -> Iterator[tuple[str, int]]:
    from diptych.model import cost
    from diptych.train.plan import count_parameters

    for name, config in PRESETS.items():
        towers = cost.image_tower(config), cost.text_tower(config, config.text.context_length)
        yield name, count_parameters(config, towers)


def _fold(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
