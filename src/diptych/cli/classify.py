"""`diptych classify`: pictures and labels to bars, lines, tables or JSON."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from diptych import files
from diptych.cli.output import ProgressBar, counted, list_counts, list_others, printable, shorten
from diptych.errors import NotFoundError, PictureError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, find_images
from diptych.model.config import Activation, Precision

DEFAULT_MODEL = Path("runs/demo")
MANY = 64
"""Pictures from which preparing the weights for a quicker precision takes less time than it saves."""
ON_A_SHEET = 200
"""Pictures of a label that --html shows."""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Zero-shot classification of images with labels you choose.

    One picture gives bars; several give a line each (picture, label, share, between tabs) and the counts of labels.

    Example: diptych classify photos/ --labels cat dog --model ViT-B-32/openai
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """Pictures, folders of pictures, .tar files (or folders of them), or globs."""
    labels: tuple[str, ...]
    """What to choose from; a|b gives two names to one class. @FILE reads a label from each line, @- from stdin."""
    model: str | None = None
    """A run's folder, a checkpoint of any layout, hf-hub:owner/name, or a published name (ViT-B-32/openai); by default
    the one that `make demo` made."""
    activation: Activation | None = None
    """Activation function of the weights (quick_gelu or gelu). Needed only where the file does not show it."""
    templates: tuple[str, ...] | None = None
    """Names of template lists (simple: a photo of a {}; none: the bare name; imagenet_80, imagenet_7), or templates
    with a {}. By default those that the checkpoint names, else simple."""
    precision: Precision | None = None
    """exact, float32, bfloat16, int8 or auto, as of `diptych embed`; by default exact, and auto for many pictures."""
    turn: bool = False
    """Turn pictures as their EXIF orientation says; OpenAI's preprocessing leaves them as they are stored."""
    device: str = "auto"
    """`cpu`, `cuda`, ...; auto takes a GPU if there is one."""
    top: int | None = None
    """Labels to show for each picture; by default 5 of one picture, 1 of several."""
    scores: bool = False
    """Also show what does not depend on the other labels: the cosine, and for a model trained with the sigmoid loss
    the probability that label and picture are a pair."""
    json: bool = False
    """Print one JSON object a line instead."""
    csv: bool = False
    """Print a table with commas instead: image, label, probability."""
    tsv: bool = False
    """The same with tabs."""
    html: Path | None = None
    """Also write a page that shows the pictures of each label."""

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise UsageError(f"top {self.top} must be at least 1; it is how many labels are shown for each picture")
        if self.json + self.csv + self.tsv > 1:
            raise UsageError("--json, --csv and --tsv are three ways to print the same; choose one")

    def __call__(self) -> int:
        labels = read_labels(self.labels, self.images)
        if self.html is not None:  # it is written last
            files.make_folder(self.html.parent, flag="--html")
            if self.html.is_dir():
                raise UsageError(f"{self.html} is a folder; name the file to write")
        from diptych.checkpoint.layouts import load
        from diptych.model.device import choose_device
        from diptych.templates import parse_templates
        from diptych.zeroshot import ZeroShotClassifier, names_of_classes

        paths, others = find_pictures(self.images)
        templates = None if self.templates is None else parse_templates(self.templates)
        names = names_of_classes([label.split("|") for label in labels])
        device = choose_device(self.device)
        loaded = load(self.model or default_model(), device=device, activation=self.activation)
        loaded = loaded.turned() if self.turn else loaded
        rows, lost, in_tars = list_items(paths)
        others += in_tars
        precision = self.precision or ("auto" if len(rows) >= MANY else "exact")
        classifier = ZeroShotClassifier(loaded, names, templates, precision=precision)
        if len(names) == 1:
            print("warning: one label has nothing to be compared with, so its 100 % says nothing", file=sys.stderr)
        failed = Counter[str]()
        for name, reason in lost:
            failed[reason] += 1
            print(f"{printable(name)}: skipped, {reason}", file=sys.stderr)
        show = self._choose_format(several=len(rows) > 1)
        first: dict[str, list[tuple[Item, float]]] = {}
        with ProgressBar("classifying") as bar:
            for number, (row, scores) in enumerate(zip(rows, classifier.score_each(rows, fetch_item), strict=True), 1):
                if len(rows) >= MANY and not sys.stdout.isatty():
                    bar.update(number, len(rows))
                if isinstance(scores, PictureError):
                    failed[scores.reason] += 1
                    print(f"{printable(row.name)}: skipped, {shorten(scores)}", file=sys.stderr)
                    continue
                order = scores.probability.argsort()[::-1][: self.top or (1 if len(rows) > 1 else 5)]
                answers = [Answer.of(scores, str(classifier.classes_[i]), int(i), extra=self.scores) for i in order]
                first.setdefault(answers[0].label, []).append((row, answers[0].probability))
                show(row.name, answers)
        counts = {label: len(some) for label, some in first.items()}
        if sum(counts.values()) > 1 and not self.json:
            print(f"in all: {list_counts(counts)}", file=sys.stderr)
        if others:
            print(f"files that were not taken for pictures: {list_others(others)}", file=sys.stderr)
        if failed:
            skipped = f"{failed.total():,} of {counted(len(rows) + len(lost), 'picture')}"
            print(f"skipped: {skipped} ({list_counts(failed)})", file=sys.stderr)
        if self.html is not None:
            print(f"written: {printable(write_sheet(self.html, first))}", file=sys.stderr)
        return 1 if failed else 0

    def _choose_format(self, *, several: bool) -> "Callable[[str, list[Answer]], None]":
        """How the answers about a picture are printed."""
        if self.json:
            return print_json
        if self.csv or self.tsv:
            table = csv.writer(sys.stdout, "excel-tab" if self.tsv else "excel", lineterminator="\n")
            columns = ["image", "label", "probability", *(("cosine", "sigmoid") if self.scores else ())]
            table.writerow(columns)
            return lambda name, answers: table.writerows(
                [name, *(f"{v:.6g}" if isinstance(v, float) else v for v in one.values(columns[1:]))] for one in answers
            )
        return print_line if several else print_bars


@dataclass(frozen=True)
class Answer:
    """A label, and how well it fits."""

    label: str
    probability: float
    cosine: float | None
    sigmoid: float | None

    @classmethod
    def of(cls, scores: Any, label: str, i: int, *, extra: bool) -> "Answer":
        """The answer of class i."""
        cosine = float(scores.cosine[i]) if extra else None
        sigmoid = float(scores.sigmoid[i]) if extra and scores.sigmoid is not None else None
        return cls(label, float(scores.probability[i]), cosine, sigmoid)

    def values(self, names: Sequence[str]) -> list[str | float | None]:
        """Fields by name."""
        return [vars(self)[name] for name in names]

    def describe(self) -> str:
        """Cosine and sigmoid in words, if they are asked for."""
        parts = "" if self.cosine is None else f"  cosine {self.cosine:+.3f}"
        return parts if self.sigmoid is None else f"{parts}  sigmoid {self.sigmoid:.2%}"


def print_json(name: str, answers: Sequence[Answer]) -> None:
    """One picture as a line of JSON."""
    labels = [{key: value for key, value in vars(answer).items() if value is not None} for answer in answers]
    print(json.dumps({"image": name, "labels": labels}))


def print_line(name: str, answers: Sequence[Answer]) -> None:
    """One picture as a line: its name, and label and share of each answer, between tabs."""
    cells = [f"{printable(one.label)}\t{one.probability:.1%}{one.describe()}" for one in answers]
    print("\t".join([printable(name), *cells]))


def print_bars(name: str, answers: Sequence[Answer]) -> None:
    """One picture as bars."""
    print(printable(name))
    width = max(len(answer.label) for answer in answers)
    for one in answers:
        bar = _bar_sign() * round(one.probability * 30)
        print(f" {one.probability:6.1%}{one.describe()}  {printable(one.label):{width}}  {bar}".rstrip())


class Item(NamedTuple):
    """A picture and what it is called."""

    name: str
    content: Any
    """Its path, or the row of a tar."""


def fetch_item(item: Item) -> Path | bytes:
    """The picture of an item; PictureError if there is none."""
    if isinstance(item.content, Path):
        return item.content
    from diptych.embed.sources import fetch  # it needs pyarrow, which takes as long to import as to answer

    return fetch(item.content)  # type: ignore[return-value]


def write_sheet(path: Path, first: dict[str, list[tuple[Item, float]]]) -> Path:
    """A page of the pictures of each label, the surest first."""
    from diptych.report.page import Section, write_page

    def show(rows: list[tuple[Item, float]]) -> Iterator[tuple[Any, str]]:
        for row, probability in sorted(rows, key=lambda one: -one[1])[:ON_A_SHEET]:
            yield fetch_item(row), f"{probability:.1%} {row.name}"

    def describe(count: int) -> str:
        return f"The surest {ON_A_SHEET} of them." if count > ON_A_SHEET else ""

    sections = [
        Section(title=f"{label}: {len(rows):,}", text=describe(len(rows)), pairs=list(show(rows)))
        for label, rows in sorted(first.items(), key=lambda item: -len(item[1]))
    ]
    total = counted(sum(map(len, first.values())), "picture")
    return write_page(path, "Pictures by label", f"{total}, each under its likeliest label.", sections)


def list_items(paths: Sequence[Path]) -> tuple[list[Item], list[tuple[str, str]], Counter[str]]:
    """The pictures, those in tars as `tar:key`; what the tars have lost, with reasons; other members by suffix."""
    rows, lost, others = list[Item](), list[tuple[str, str]](), Counter[str]()
    for path in paths:
        if path.suffix.lower() != ".tar":
            rows.append(Item(str(path), path))
            continue
        from diptych.embed.sources import ShardSource

        source = ShardSource.open(path, "image")
        rows += [Item(f"{path}:{row.id}", row) for row in source.read(0, source.rows)]
        lost += [(f"{path}:{key}", reason) for key, reason in source.lost]
        others.update(source.passed_over)
    if not rows and not lost:
        raise NotFoundError(f"no pictures in {' '.join(map(str, paths))}")
    return rows, lost, others


def _bar_sign() -> str:
    """A block, where the terminal's encoding has one."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#"
    return "█"


def read_labels(given: Sequence[str], images: Sequence[str]) -> list[str]:
    """Labels as they are, and those of the files that are named with an @; UsageError for what cannot be meant."""
    labels: list[str] = []
    swallowed = [label for label in given if Path(label).suffix.lower() in IMAGE_SUFFIXES and Path(label).is_file()]
    if swallowed and not images:
        raise UsageError(
            f"no picture was named, and {counted(len(swallowed), 'label')} of {len(given):,} are pictures "
            f"({swallowed[0]}, ...): --labels takes all that stands behind it, so name pictures before it"
        )
    for label in given:
        if not label.startswith("@"):
            if Path(label).suffix.lower() in (".txt", ".csv") and Path(label).is_file():
                raise UsageError(f"the label {label} is a file; --labels @{label} takes a label from each of its lines")
            labels.append(label)
            continue
        try:
            text = read_stdin() if label == "@-" else files.read_text(Path(label[1:]))
        except FileNotFoundError:
            raise NotFoundError(f"no such file of labels: {label[1:]}") from None
        labels += [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise UsageError("no label was named; give several to choose from")
    return labels


def read_stdin() -> str:
    """All of the standard input, nothing if it is closed; UsageError if it is not UTF-8, whatever the locale."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError:
        raise UsageError("the standard input is not UTF-8; save it as UTF-8") from None


def find_pictures(patterns: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """Files as they are, tars of folders or else pictures below them, and what globs match; and how many other files
    there are by suffix."""
    if not all(patterns) or not patterns:
        raise UsageError("no picture was named; give pictures, folders of pictures, or globs (before --labels)")
    found: list[Path] = []
    others = Counter[str]()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir() and (tars := sorted(path.glob("*.tar"))):
            found += tars
        elif path.is_dir():
            names, passed_over = find_images(path)
            found += [path / name for name in names]
            others += passed_over
        elif path.exists() or not files.is_glob(pattern):
            if not path.exists():
                raise NotFoundError(f"no such picture: {path}")
            found.append(path)
        else:
            matched = [Path(one) for one in files.expand_glob(pattern)]
            taken = [one for one in matched if one.suffix.lower() in IMAGE_SUFFIXES | {".tar"}]
            found += taken
            others.update(one.suffix.lower() for one in set(matched) - set(taken))
    if not found:
        kinds = f"looked for {' '.join(sorted(IMAGE_SUFFIXES))}"
        seen = f"; other files: {list_others(others)}" if others else ""
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
