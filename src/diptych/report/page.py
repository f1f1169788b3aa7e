"""One HTML file that needs nothing else: sections of text, tables, figures, pictures with captions, answers.

What users and strangers wrote is escaped by the template; pictures are small JPEGs inside the file, and no script runs.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from diptych import files
from diptych.errors import PictureError
from diptych.report.charts import Chart

if TYPE_CHECKING:
    from jinja2 import Environment

    from diptych.image import Picture

THUMBNAIL = 96
"""Longest side of a picture on a page, pixels."""
EXAMPLES = 8
"""Right answers that are shown of a set, and wrong ones."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture, what it is, and what the model says, the likeliest first."""

    picture: "Picture"
    label: str
    answers: Sequence[tuple[str, float]]

    @property
    def is_right(self) -> bool:
        """Whether the first answer is the label."""
        return self.answers[0][0] == self.label


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    text: str = ""
    table: Sequence[Sequence[object]] = ()
    """Rows, the first with the heads of the columns."""
    chart: Chart | None = None
    pairs: Sequence[tuple["Picture", str]] = ()
    """Pictures with their captions."""
    similarity: Float[np.ndarray, "N N"] | None = None
    """Cosine of every picture of `pairs` with every caption."""
    examples: Sequence[Example] = ()


@cache
def environment() -> "Environment":
    """Templates that escape what they are given."""
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters |= {
        "thousands": lambda number: f"{number:,}",
        "thumbnail": thumbnail,
        "figure": figure,
        "shade": shade,
    }
    return made


def render(template: str, **values: object) -> str:
    """A page from one of the templates in `assets`; half characters, as names of files have them, as their codes."""
    source = resources.files("diptych.assets").joinpath(template).read_text("utf-8")
    return environment().from_string(source).render(**values).encode(errors="backslashreplace").decode()


def write_page(path: Path, title: str, text: str, sections: Sequence[Section]) -> Path:
    """Write the sections that hold something; returns the path."""
    shown = [s for s in sections if s.table or s.chart or s.pairs or s.examples]
    files.write_bytes(
        path, render("page.html.j2", title=title, text=text, sections=shown).encode(errors="backslashreplace")
    )
    return path


def pick_rows(is_right: Bool[np.ndarray, " N"], each: int = EXAMPLES) -> list[int]:
    """Rows of right and of wrong answers, evenly spread over all."""
    kinds = np.flatnonzero(is_right).tolist(), np.flatnonzero(~is_right).tolist()
    return [row for rows in kinds for row in rows[:: max(1, len(rows) // each)][:each]]


def thumbnail(picture: "Picture") -> str:
    """A small copy of a picture as a data URL; empty where it cannot be decoded."""
    from diptych.image import open_picture, to_rgb

    try:
        image = to_rgb(open_picture(picture))
    except PictureError:
        return ""
    image = image if image.width * image.height else Image.new("RGB", (1, 1))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return data_url(encoded.getvalue(), "image/jpeg")


def figure(chart: Chart) -> str:
    """A chart as a data URL; empty without matplotlib."""
    try:
        from diptych.report.draw import draw_svg
    except ModuleNotFoundError:
        return ""
    return data_url(draw_svg(chart), "image/svg+xml")


def data_url(content: bytes, kind: str) -> str:
    """Bytes inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shade(matrix: Float[np.ndarray, "N N"]) -> list[list[Mapping[str, str]]]:
    """Colour and text of every cell, from the lowest to the highest value."""
    low, high = float(matrix.min()), float(matrix.max())
    shares = (matrix - low) / max(high - low, 1e-9)
    return [
        [
            {"colour": f"hsl({240 - 190 * share:.0f} 60% {25 + 40 * share:.0f}%)", "value": f"{value:.2f}"}
            for share, value in zip(row, values, strict=True)
        ]
        for row, values in zip(shares.tolist(), matrix.tolist(), strict=True)
    ]
