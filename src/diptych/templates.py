"""Prompt templates: a class name goes where their `{}` is (paper section 3.1.4). Nothing here imports torch."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources

from diptych.errors import UsageError, unknown_name

SIMPLE = ("a photo of a {}.",)
"""What is used where nobody says otherwise: the list `simple`."""


@lru_cache
def load_templates(name: str) -> tuple[str, ...]:
    """A list of prompt templates by name: `imagenet_80` (the paper's ensemble), `imagenet_7` (the seven that forward
    selection kept of them), `simple` (a photo of a ...), `none` (the bare name)."""
    known: Mapping[str, list[str]] = json.loads(
        resources.files("diptych.assets").joinpath("templates.json").read_text("utf-8")
    )
    if name not in known:
        error = unknown_name("template list", name, known)
        raise UsageError(f"{error}; a template of your own has one {{}} where the class name goes")
    return tuple(known[name])


def parse_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Templates from names of lists and from texts with a {}; UsageError if that gives none, or one without its {}."""
    templates = tuple(t for one in given for t in ((one,) if "{}" in one else load_templates(one)))
    if not templates:
        raise UsageError("no template was named; use simple, imagenet_80, imagenet_7, none, or a text with a {}")
    for template in templates:
        fill_template(template, "")
    return templates


def fill_template(template: str, name: str) -> str:
    """Put a class name into a template's `{}`; other braces are left alone."""
    if template.count("{}") != 1:
        raise UsageError(f"template {template!r} needs exactly one {{}} where the class name goes")
    return template.replace("{}", name)
