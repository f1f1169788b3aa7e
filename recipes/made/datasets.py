"""Datasets that are made on this machine, without the network, in CLIP_benchmark's WebDataset layout.

    digits          scikit-learn's 1,797 handwritten digits, if it is installed
    rendered_text   sentences with an opinion as pictures: a stand-in for tasks that read, and not Rendered SST2
    counting        3 to 10 shaded objects on a floor: a stand-in for tasks that count, and not CLEVR

Numbers on the last two say whether a model reads or counts at all; they are not comparable with the paper's. A folder
appears whole or not at all, and the same seed gives the same bytes with the same version of Pillow.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import PIL
from PIL import Image
from recipes.made.drawings import (
    FEWEST,
    MOST,
    OPINIONS,
    Draws,
    draw_scene,
    draw_sentence,
    encode_png,
    place_objects,
    write_sentence,
)

from diptych import files
from diptych.errors import UsageError, unknown_name
from diptych.shards.order import derive_seed, permutation

SAMPLES_PER_SHARD = 1000
ABOUT_FILE = "made.json"
"""What a folder that was made here says of itself; only such a folder is replaced."""
DIGITS_TRAIN = 1000
"""The first ones are for training: the order is by writer, so most writers are in one split only."""
DIGIT_SIZE = 64


@dataclass(frozen=True)
class Sample:
    """A picture, its class, and what else there is to know of it."""

    png: bytes
    label: int
    text: str = ""


def make_digits(out: Path) -> None:
    """Write scikit-learn's digits: 8 x 8 pixels, enlarged; 1,000 for training and 797 for the test.

    Raises UsageError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed; pip install scikit-learn"
        ) from None
    pixels, labels = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    pictures = pixels.reshape(-1, 8, 8)

    def samples(rows: range) -> Iterator[Sample]:
        for row in rows:
            small = Image.fromarray(np.rint(pictures[row] * (255 / 16)).astype(np.uint8))
            large = small.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
            yield Sample(encode_png(large.convert("RGB")), int(labels[row]))

    _write_dataset(
        out,
        classnames=[str(digit) for digit in range(10)],
        templates=['a photo of the number: "{c}".'],
        splits={"train": samples(range(DIGITS_TRAIN)), "test": samples(range(DIGITS_TRAIN, len(labels)))},
        about={"name": "digits", "what": "Optical recognition of handwritten digits, as scikit-learn ships it"},
    )


def make_rendered_text(out: Path, *, train: int = 2000, test: int = 1000, seed: int = 0) -> None:
    """Write sentences as pictures; no sentence of the test is among those for training."""
    _check_counts(train, test, 2)
    taken: set[str] = set()

    def samples(split: str, count: int) -> Iterator[Sample]:
        for number, label in enumerate(_balanced(count, 2, seed, split)):
            sentence = _new_sentence(taken, seed, split, number, label)
            yield Sample(encode_png(draw_sentence(sentence)), label, sentence)

    _write_dataset(
        out,
        classnames=OPINIONS,
        templates=["a {c} review of a movie.", "a photo of a {c} opinion about a film."],
        splits={"test": samples("test", test), "train": samples("train", train)},
        about={
            "name": "rendered_text",
            "what": "A stand-in, from a grammar of our own; not Rendered SST2",
            "seed": seed,
        },
    )


def make_counting(out: Path, *, train: int = 2000, test: int = 500, seed: int = 0) -> None:
    """Write scenes of 3 to 10 objects, as many of each number; sizes by default as in the paper's CLEVR Counts."""
    classes = MOST - FEWEST + 1
    _check_counts(train, test, classes)

    def samples(split: str, count: int) -> Iterator[Sample]:
        for number, label in enumerate(_balanced(count, classes, seed, split)):
            draws = Draws(seed, f"counting {split}", number)
            yield Sample(encode_png(draw_scene(place_objects(draws, FEWEST + label))), label)

    _write_dataset(
        out,
        classnames=[str(count) for count in range(FEWEST, MOST + 1)],
        templates=["a photo of {c} objects.", "a picture of {c} things on a floor."],
        splits={"train": samples("train", train), "test": samples("test", test)},
        about={"name": "counting", "what": "A stand-in, drawn by our own generator; not CLEVR", "seed": seed},
    )


MADE: dict[str, Callable[[Path], None]] = {
    "digits": make_digits,
    "rendered_text": make_rendered_text,
    "counting": make_counting,
}
"""By the ids of the registry, with the sizes and the seed that its numbers are for."""


def make_datasets(out: Path, names: Sequence[str] = tuple(MADE)) -> Iterator[str]:
    """Make several into out/NAME, each if it is not there; yields the name of each when it is ready."""
    for name in names:
        if name not in MADE:
            raise unknown_name("dataset", name, MADE)
    for name in names:
        if not (out / name / ABOUT_FILE).is_file():
            MADE[name](out / name)
        yield name


def _check_counts(train: int, test: int, classes: int) -> None:
    if min(train, test) < classes:
        raise UsageError(f"{train} pictures for training and {test} for the test; each needs one of {classes} classes")


def _balanced(count: int, classes: int, seed: int, split: str) -> list[int]:
    """Labels in random order, of each class as many as of another, or one more."""
    order = permutation(count, derive_seed("labels", seed, split))
    return [int(place) % classes for place in order]


def _new_sentence(taken: set[str], seed: int, split: str, number: int, label: int) -> str:
    """A sentence that was not written before in any split."""
    for attempt in range(10_000):
        sentence = write_sentence(Draws(seed, f"sentence {split} {attempt}", number), label)
        if sentence not in taken:
            taken.add(sentence)
            return sentence
    raise UsageError(f"the grammar has no more than about {len(taken):,} sentences; ask for fewer")


def _write_dataset(
    out: Path,
    *,
    classnames: Sequence[str],
    templates: Sequence[str],
    splits: dict[str, Iterator[Sample]],
    about: dict[str, str | int],
) -> None:
    """The whole folder, which appears when it is complete."""
    if out.exists() and not (out / ABOUT_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there and was not made here; name another folder")
    files.make_folder(out.parent, flag="folder")
    with files.atomic_folder(out) as folder:
        (folder / "classnames.txt").write_text("\n".join(classnames) + "\n", encoding="utf-8")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n", encoding="utf-8")
        counts = {split: _write_split(folder / split, samples) for split, samples in splits.items()}
        files.write_json(folder / ABOUT_FILE, {**about, "pictures": counts, "pillow": PIL.__version__})


def _write_split(folder: Path, samples: Iterable[Sample]) -> int:
    """0.tar, 1.tar, ... and how many of them there are; returns the number of samples."""
    folder.mkdir()
    shards, count = 0, 0
    waiting: list[tuple[int, Sample]] = []
    for sample in samples:
        waiting.append((count, sample))
        count += 1
        if len(waiting) == SAMPLES_PER_SHARD:
            _write_shard(folder / f"{shards}.tar", waiting)
            shards, waiting = shards + 1, []
    if waiting:
        _write_shard(folder / f"{shards}.tar", waiting)
        shards += 1
    (folder / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    return count


def _write_shard(path: Path, samples: Sequence[tuple[int, Sample]]) -> None:
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in samples:
            members = [("png", sample.png), ("cls", str(sample.label).encode())]
            members += [("txt", sample.text.encode())] if sample.text else []
            for ending, content in members:
                info = tarfile.TarInfo(f"s{number:07d}.{ending}")  # no time, no owner
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
