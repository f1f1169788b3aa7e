"""`diptych classify`: pictures and labels to bars or JSON."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diptych import files
from diptych.cli.output import counted, list_counts, printable, shorten
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
    """What to choose from; a|b gives two names to one class. @FILE reads a label from each line, @- from stdin."""
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

        paths, others = find_pictures(self.images)
        templates = parse_templates(self.templates)
        names = names_of_classes([label.split("|") for label in read_labels(self.labels)])
        device = choose_device(self.device)
        loaded = load(self.model or default_model(), device=device, activation=self.activation)
        precision = self.precision or ("auto" if len(paths) >= MANY else "exact")
        classifier = ZeroShotClassifier(loaded, names, templates, precision=precision)
        if len(names) == 1:
            print("warning: one label has nothing to be compared with, so its 100 % says nothing", file=sys.stderr)
        first, failed = Counter[str](), Counter[str]()
        for path, scores in zip(paths, classifier.predict_each(paths), strict=True):
            if isinstance(scores, PictureError):
                failed[scores.reason] += 1
                print(f"{printable(path)}: skipped, {shorten(scores)}", file=sys.stderr)
                continue
            order = scores.argsort()[::-1][: self.top]
            answers = [(str(classifier.classes_[i]), float(scores[i])) for i in order]
            first[answers[0][0]] += 1
            print_answers(path, answers, as_json=self.json)
        if first.total() > 1 and not self.json:
            print(f"in all: {list_counts(first)}")
        if others:
            print(f"files that were not taken for pictures: {list_counts(others)}", file=sys.stderr)
        if failed:
            skipped = f"{failed.total():,} of {counted(len(paths), 'picture')}"
            print(f"skipped: {skipped} ({list_counts(failed)})", file=sys.stderr)
        return 1 if failed else 0


def print_answers(path: Path, answers: list[tuple[str, float]], *, as_json: bool) -> None:
    """One picture's labels: bars for people, JSON for machines."""
    if as_json:
        print(json.dumps({"image": str(path), "labels": [{"label": n, "probability": p} for n, p in answers]}))
        return
    print(printable(path))
    width = max(len(label) for label, _ in answers)
    for label, probability in answers:
        bar = _bar_sign() * round(probability * 30)
        print(f" {probability:6.1%}  {printable(label):{width}}  {bar}".rstrip())


def _bar_sign() -> str:
    """A block, where the terminal's encoding has one."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#"
    return "█"


def read_labels(given: Sequence[str]) -> list[str]:
    """Labels as they are, and those of the files that are named with an @; UsageError for what cannot be meant."""
    labels: list[str] = []
    for label in given:
        if not label.startswith("@"):
            if Path(label).suffix.lower() in (".txt", ".csv") and Path(label).is_file():
                raise UsageError(f"the label {label} is a file; --labels @{label} takes a label from each of its lines")
            labels.append(label)
            continue
        try:
            text = sys.stdin.read() if label == "@-" else Path(label[1:]).read_text("utf-8-sig")
        except FileNotFoundError:
            raise NotFoundError(f"no such file of labels: {label[1:]}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{label[1:]} is not UTF-8; save it as UTF-8, a label on each line") from None
        labels += [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise UsageError("no label was named; give several to choose from")
    return labels


def find_pictures(patterns: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """Files as they are, pictures below folders, and what globs match; and how many other files there are by suffix."""
    if not all(patterns) or not patterns:
        raise UsageError("no picture was named; give pictures, folders of pictures, or globs (before --labels)")
    found: list[Path] = []
    others = Counter[str]()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            names, passed_over = find_images(path)
            found += [path / name for name in names]
            others += passed_over
        elif path.exists() or not files.is_glob(pattern):
            if not path.exists():
                raise NotFoundError(f"no such picture: {path}")
            found.append(path)
        else:
            matched = [Path(one) for one in files.expand_glob(pattern)]
            found += [one for one in matched if one.suffix.lower() in IMAGE_SUFFIXES]
            others.update(one.suffix.lower() for one in matched if one.suffix.lower() not in IMAGE_SUFFIXES)
    if not found:
        kinds = f"looked for {' '.join(sorted(IMAGE_SUFFIXES))}"
        seen = f"; other files: {list_counts(others)}" if others else ""
        raise NotFoundError(f"no pictures in {' '.join(patterns)} ({kinds}{seen})")
    return found, others


def default_model() -> Path:
    """The model that is used when none is named."""
    if not DEFAULT_MODEL.is_dir():
        raise UsageError(
            f"no model was named and {DEFAULT_MODEL} does not exist; pass --model (ViT-B-32/openai for photos), or run "
            "`make demo`"
        )
    return DEFAULT_MODEL
