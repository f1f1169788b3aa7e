"""Pictures with known answers that are drawn here: sentences with an opinion, and objects to count.

Everything is a pure function of (seed, split, number): randomness is a hash of our own, since the streams of library
generators may change. The bytes of a picture also depend on the version of Pillow, which draws and compresses it.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diptych.shards.order import derive_seed, uniforms

SENTENCE_SIZE = 448
"""Side of the picture of a sentence; the paper rendered its sentences at this size."""
SCENE_SIZE = 224
FEWEST, MOST = 3, 10
"""Objects in a scene, as in CLEVR."""
_DRAWS = 64
"""Random numbers that are computed at a time."""
_T = TypeVar("_T")

THINGS = (
    *(
        "the film",
        "this movie",
        "the story",
        "the acting",
        "the script",
        "the ending",
        "the dialogue",
        "the first hour",
    ),
    *("the camera work", "the soundtrack", "the leading actress", "the director's debut", "the sequel", "the comedy"),
    *("every scene", "the whole cast", "the editing", "this remake", "the documentary", "the plot"),
)
GOOD = (
    *("wonderful", "moving", "clever", "funny", "gripping", "beautiful", "warm", "original", "fresh", "delightful"),
    *("brilliant", "charming", "honest", "thoughtful", "exciting", "touching", "witty", "superb", "lively", "elegant"),
)
BAD = (
    *("dull", "tedious", "clumsy", "boring", "shallow", "predictable", "silly", "lifeless", "confusing", "annoying"),
    *("terrible", "flat", "pointless", "tired", "messy", "noisy", "forgettable", "awkward", "dreary", "lazy"),
)
DEGREES = ("really", "quite", "truly", "surprisingly", "often", "simply", "thoroughly", "remarkably")
LOVED = ("I loved it", "I would see it again", "it stays with you", "it is worth every minute", "I left with a smile")
HATED = (
    "I looked at my watch",
    "I want my money back",
    "I nearly fell asleep",
    "it was a waste of time",
    "I left early",
)
OPINIONS = ("negative", "positive")
"""Class 0 and class 1."""

COLOURS = ((173, 35, 35), (42, 75, 215), (29, 105, 20), (129, 38, 192), (41, 208, 208), (255, 146, 51), (255, 238, 51))
SHAPES = ("ball", "cube", "cylinder")
_VISIBLE = 0.72
"""How much of an object's disc may not be covered by discs in front of it, at least."""


class Draws:
    """Random numbers of one picture, one after the other."""

    def __init__(self, seed: int, split: str, number: int) -> None:
        self._origin = ("made", seed, split)
        self._position = np.arange(number, number + 1, dtype=np.int64)
        self._block = 0
        self._waiting: list[float] = []

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        """Anything in [low, high)."""
        if not self._waiting:
            seed = derive_seed(*self._origin, self._block)
            self._waiting = uniforms(seed, self._position, _DRAWS)[0].tolist()
            self._block += 1
        return low + (high - low) * self._waiting.pop()

    def pick(self, some: Sequence[_T]) -> _T:
        """One of them."""
        return some[int(self.number(0.0, float(len(some))))]


def write_sentence(draws: Draws, opinion: int) -> str:
    """A sentence with an opinion: 0 is negative, 1 positive.

    Both words of praise and of blame occur in both classes, since some are denied (`not boring at all`): counting words
    is not enough.
    """
    own, other = (GOOD, BAD) if opinion else (BAD, GOOD)
    ending = draws.pick(LOVED if opinion else HATED)
    thing, degree, word, second = draws.pick(THINGS), draws.pick(DEGREES), draws.pick(own), draws.pick(own)
    denied = draws.pick(other)
    forms = (
        f"{thing} is {degree} {word}.",
        f"{thing} is {word} and {degree} {second}.",
        f"{thing} is not {denied} at all; {ending}.",
        f"{thing} is anything but {denied}.",
        f"people said that {thing} would be {denied}, but it is {degree} {word}.",
        f"{thing} is {word}, and {ending}.",
        f"some moments are {denied}, yet {thing} is {degree} {word}.",
        f"{ending}: {thing} is {word}.",
    )
    sentence = draws.pick(forms)
    return sentence[0].upper() + sentence[1:]


def draw_sentence(sentence: str) -> Image.Image:
    """Black on white, wrapped, in one size."""
    picture = Image.new("RGB", (SENTENCE_SIZE, SENTENCE_SIZE), "white")
    font = ImageFont.load_default(size=32)
    text = "\n".join(textwrap.wrap(sentence, 22))
    ImageDraw.Draw(picture).multiline_text((24, 24), text, fill="black", font=font, spacing=10)
    return picture


@dataclass(frozen=True)
class Thing:
    """An object of a scene, by its disc on the picture."""

    x: float
    y: float
    radius: float
    shape: str
    colour: tuple[int, int, int]
    shiny: bool


def place_objects(draws: Draws, count: int) -> list[Thing]:
    """Objects at random places of a floor, the far ones first and smaller; none is hidden by those in front."""
    things: list[Thing] = []
    shrink = 1.0
    while len(things) < count:
        things = []
        for _ in range(40 * count):
            thing = _place_one(draws, shrink)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
            if len(things) == count:
                break
        shrink *= 0.9  # a crowded floor gets smaller objects
    return sorted(things, key=lambda thing: thing.y)


def _place_one(draws: Draws, shrink: float) -> Thing:
    depth = draws.number()  # 0: far, 1: near
    radius = SCENE_SIZE * shrink * (0.045 + 0.035 * depth) * draws.number(0.8, 1.25)
    return Thing(
        x=draws.number(radius + 4, SCENE_SIZE - radius - 4),
        y=SCENE_SIZE * (0.36 + 0.52 * depth),
        radius=radius,
        shape=draws.pick(SHAPES),
        colour=draws.pick(COLOURS),
        shiny=draws.number() < 0.5,
    )


def _apart(a: Thing, b: Thing) -> bool:
    """Whether their discs overlap little enough."""
    distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
    return distance >= _VISIBLE * (a.radius + b.radius)


def draw_scene(things: Sequence[Thing]) -> Image.Image:
    """Shaded objects with shadows on a grey floor, lit from the upper left."""
    scale = 2  # drawn at twice the size, so that edges are smooth
    side = scale * SCENE_SIZE
    rows = np.linspace(0, 1, side)[:, None, None]
    canvas = np.broadcast_to(150 + 60 * rows, (side, side, 3)).copy()
    y, x = np.mgrid[:side, :side].astype(np.float64)
    for thing in things:
        _shadow(canvas, x, y, thing, scale)
    for thing in things:
        _draw_thing(canvas, x, y, thing, scale)
    picture = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return picture.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX)


def _window(x: NDArray, thing: Thing, scale: int, margin: float) -> tuple[slice, slice]:
    """The part of the canvas that a thing can touch."""
    reach = margin * thing.radius * scale
    ends = [(max(0, int(at * scale - reach)), min(len(x), int(at * scale + reach) + 1)) for at in (thing.y, thing.x)]
    return slice(*ends[0]), slice(*ends[1])


def _shadow(canvas: NDArray, x: NDArray, y: NDArray, thing: Thing, scale: int) -> None:
    window = _window(x, thing, scale, 2.0)
    radius = thing.radius * scale
    dx = (x[window] - thing.x * scale - 0.5 * radius) / (1.15 * radius)
    dy = (y[window] - thing.y * scale - 0.8 * radius) / (0.45 * radius)
    dark = 0.45 * np.clip(1 - (dx**2 + dy**2), 0, 1)
    canvas[window] *= (1 - dark)[..., None]


def _draw_thing(canvas: NDArray, x: NDArray, y: NDArray, thing: Thing, scale: int) -> None:
    window = _window(x, thing, scale, 1.05)
    u = (x[window] - thing.x * scale) / (thing.radius * scale)
    v = (y[window] - thing.y * scale) / (thing.radius * scale)
    inside, light = {"ball": _ball, "cube": _cube, "cylinder": _cylinder}[thing.shape](u, v)
    colour = np.array(thing.colour, dtype=np.float64) * (0.35 + 0.75 * light)[..., None]
    if thing.shiny:
        glare = np.clip(1 - ((u + 0.35) ** 2 + (v + 0.4) ** 2) / 0.06, 0, 1)[..., None]
        colour = colour + 150 * glare
    canvas[window] = np.where(inside[..., None], colour, canvas[window])


def _ball(u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
    """Where it is, and how much light falls there (0..1)."""
    depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    return u**2 + v**2 <= 1, np.clip(-0.45 * u - 0.55 * v + 0.7 * depth, 0, 1)


def _cube(u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
    """A corner towards us: a lid and two sides, of three brightnesses."""
    width = 0.85
    lid = (np.abs(u) / width + np.abs(v + 0.5) / 0.4) <= 1
    low = -0.5 + 0.4 * (1 - np.abs(u) / width)
    side = (np.abs(u) <= width) & (v >= low) & (v <= low + 0.95)
    return lid | side, np.where(lid, 0.95, np.where(u < 0, 0.65, 0.3))


def _cylinder(u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
    """An ellipse as lid, and a round side."""
    width, tilt = 0.7, 0.28
    lid = (u / width) ** 2 + ((v + 0.6) / tilt) ** 2 <= 1
    bow = tilt * np.sqrt(np.clip(1 - (u / width) ** 2, 0, 1))
    side = (np.abs(u) <= width) & (v >= -0.6) & (v <= 0.6 + bow)
    return lid | side, np.where(lid, 0.9, np.clip(0.6 - 0.55 * u / width, 0, 1))


def encode_png(picture: Image.Image) -> bytes:
    """Lossless, without a date."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()
