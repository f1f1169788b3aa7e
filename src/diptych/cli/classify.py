"""`diptych classify`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from diptych.cli.words import counted
from diptych.errors import NotFoundError, PictureError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, find_images
from diptych.model.config import Activation, Precision

DEFAULT_MODEL = Path("runs/demo")
MANY = 64
"""Pictures from which preparing the weights for a quicker precision takes less time than it saves."""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Zero-shot classification of images with labels you choose."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, or globs."""
    labels: tuple[str, ...]
    """What to choose from; a|b gives two names to one class."""
    model: str | None = None
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai); by default
    the one that `make demo` made."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    templates: tuple[str, ...] = ("simple",)
    """Names of template lists (simple, imagenet_80, imagenet_7, none), or templates with a {}."""
    precision: Precision | None = None
    """exact, float32, bfloat16, int8 or auto, as of `diptych embed`; by default exact, and auto for many pictures."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    top: int = 5
    """Labels to show for each picture."""
    json: bool = False
    """Print one JSON object a line instead of bars."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"top {self.top} must be at least 1; it is how many labels are shown for each picture")

    def __call__(self) -> int:
        from diptych.checkpoint.layouts import load
        from diptych.model.device import choose_device
        from diptych.templates import parse_templates
        from diptych.zeroshot import ZeroShotClassifier, names_of_classes

        paths = find_pictures(self.images)
        templates = parse_templates(self.templates)
        names = names_of_classes([label.split("|") for label in self.labels])
        device = choose_device(self.device)
        loaded = load(self.model or default_model(), device=device, activation=self.activation)
        precision = self.precision or ("auto" if len(paths) >= MANY else "exact")
        classifier = ZeroShotClassifier(loaded, names, templates, precision=precision)
        failed = 0
        for path, scores in zip(paths, classifier.predict_each(paths), strict=True):
            if isinstance(scores, PictureError):
                failed += 1
                print(f"{path}: skipped, {scores}", file=sys.stderr)
                continue
            order = scores.argsort()[::-1][: self.top]
            answers = [(str(classifier.classes_[i]), float(scores[i])) for i in order]
            print_answers(path, answers, as_json=self.json)
        if failed:
            print(f"skipped: {failed:,} of {counted(len(paths), 'picture')}", file=sys.stderr)
        return 1 if failed else 0


def print_answers(path: Path, answers: list[tuple[str, float]], *, as_json: bool) -> None:
    """One picture's labels: bars for people, JSON for machines."""
    if as_json:
        print(json.dumps({"image": str(path), "labels": [{"label": n, "probability": p} for n, p in answers]}))
        return
    table = Table(title=str(path), title_justify="left", show_header=False, box=None)
    for label, probability in answers:
        table.add_row(f"{probability:6.1%}", label, "█" * round(probability * 30))
    Console().print(table)


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files as they are, folders for the pictures in them, globs for what they match; in a stable order."""
    if not all(patterns) or not patterns:
        raise UsageError("no picture was named; give pictures, folders of pictures, or globs")
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found += [path / name for name in find_images(path)[0]]
        elif path.exists() or not any(sign in pattern for sign in "*?["):
            if not path.exists():
                raise NotFoundError(f"no such picture: {path}")
            found.append(path)
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            found += sorted(anchor.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    if not found:
        raise NotFoundError(f"no pictures in {' '.join(patterns)} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def default_model() -> Path:
    """The model that is used when none is named."""
    if not DEFAULT_MODEL.is_dir():
        raise UsageError(f"no model was named and {DEFAULT_MODEL} does not exist; pass --model, or run `make demo`")
    return DEFAULT_MODEL
