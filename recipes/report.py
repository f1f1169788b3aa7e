"""The demo's report: one HTML file with its pictures inside, and overview.png, the same at a glance."""

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray

from diptych import files
from diptych.image import Picture, open_picture, to_rgb
from diptych.pair import Pair

matplotlib.use("Agg")

_RIGHT, _WRONG = "#2d7a3e", "#b3401f"
_PALE = {_RIGHT: "#a5d3b0", _WRONG: "#eab8a6"}
_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Example:
    """A picture, what it is, and what the model says."""

    picture: Picture
    label: str
    answers: Sequence[tuple[str, float]]


def write_report(
    out: Path,
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]],
    matrix: NDArray[np.float32],
    batch: Sequence[Pair],
) -> None:
    """Write `report.html` and `overview.png` into the run's folder."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    shown = {
        title: [
            {
                "picture": embed_picture(example.picture),
                "label": example.label,
                "answers": example.answers,
                "right": example.answers[0][0] == example.label,
            }
            for example in some
        ]
        for title, some in examples.items()
    }
    html = template.render(
        results=results,
        tests=[(title, results[name]) for title, name in zip(examples, list(results)[2:], strict=False)],
        examples=shown,
        loss_curve=draw_loss(read_metrics(out)),
        similarity=draw_similarity(matrix, [pair.caption for pair in batch]),
    )
    files.write_bytes(out / "report.html", html.encode())
    title, some = next(iter(examples.items()))
    files.write_bytes(out / "overview.png", draw_overview(matrix, batch, title, results["held_out_family"], some))


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def draw_loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss and temperature over the steps."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in metrics]
    axes.plot(steps, [line["loss"] for line in metrics], color="#2457a6")
    axes.set(xlabel="step", ylabel="loss")
    scale = axes.twinx()
    scale.plot(steps, [line["logit_scale"] for line in metrics], color="#b5541c", linewidth=1)
    scale.set_ylabel("logit scale", color="#b5541c")
    return _encode_figure(figure)


def draw_similarity(matrix: NDArray[np.float32], captions: Sequence[str]) -> str:
    """Cosine similarity of every picture of a batch to every text of it: what training pulls to the diagonal."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(matrix, cmap="viridis")
    captions = [textwrap.shorten(caption, 28, placeholder=" …") for caption in captions]
    axes.set_xticks(range(len(captions)), captions, rotation=90, fontsize=7)
    axes.set_yticks(range(len(captions)), captions, fontsize=7)
    axes.set(xlabel="text", ylabel="picture of")
    figure.colorbar(drawn, label="cosine similarity", shrink=0.7)
    return _encode_figure(figure)


def draw_overview(
    matrix: NDArray[np.float32],
    batch: Sequence[Pair],
    title: str,
    scores: Mapping[str, Any],
    examples: Sequence[Example],
) -> bytes:
    """A PNG of the similarity matrix beside right and wrong answers, with the numbers that they are examples of."""
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = np.ravel(np.array(figure.subfigures(1, 2, width_ratios=(1, 1.25))))
    _draw_diagonal(left, matrix, batch)
    right.suptitle(
        f"{title}, never seen: {scores['acc1']:.1%} right of {scores['classes']} names (chance {scores['chance']:.2%})",
        fontsize=11,
    )
    correct = [example for example in examples if example.answers[0][0] == example.label]
    wrong = [example for example in examples if example.answers[0][0] != example.label]
    rows = min(5, len(correct), len(wrong))
    cells = right.subplots(rows, 4, width_ratios=(1, 2.4, 1, 2.4), squeeze=False)
    for row in range(rows):
        _draw_answers(cells[row, :2], correct[row], _RIGHT)
        _draw_answers(cells[row, 2:], wrong[row], _WRONG)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=110)
    return encoded.getvalue()


def _draw_diagonal(figure: SubFigure, matrix: NDArray[np.float32], batch: Sequence[Pair]) -> None:
    figure.suptitle("cosine similarity of training icons and their names", fontsize=11)
    axes = figure.subplots()
    axes.imshow(matrix, cmap="viridis")
    captions = [textwrap.shorten(pair.caption, 22, placeholder=" …") for pair in batch]
    axes.set_xticks(range(len(batch)), captions, rotation=90, fontsize=8)
    axes.set_yticks([])
    for row, pair in enumerate(batch):
        image = np.asarray(to_rgb(open_picture(pair.image or b"")))
        size = max(image.shape)
        icon = OffsetImage(image, zoom=11 / size)
        place = AnnotationBbox(
            icon, (-0.02, row), xycoords=("axes fraction", "data"), box_alignment=(1, 0.5), frameon=False
        )
        axes.add_artist(place)


def _draw_answers(cells: Sequence[Axes], example: Example, color: str) -> None:
    picture, bars = cells
    picture.imshow(np.asarray(to_rgb(open_picture(example.picture))))
    picture.set_axis_off()
    names, shares = zip(*example.answers[:3], strict=True)
    bars.barh(range(len(names)), shares, color=[_PALE[color] if name == example.label else "#d5d9df" for name in names])
    for place, name in enumerate(names):
        bars.text(0.02, place, textwrap.shorten(name, 26, placeholder=" …"), va="center", fontsize=9)
    bars.set(xlim=(0, 1), ylim=(2.6, -0.6))
    bars.set_title(example.label, fontsize=9, loc="left", color=color, pad=2)
    bars.set_axis_off()


def embed_picture(picture: Picture) -> str:
    """A picture as a data URL."""
    encoded = io.BytesIO()
    to_rgb(open_picture(picture)).save(encoded, "PNG")
    return _data_url(encoded.getvalue())


def _encode_figure(figure: Figure) -> str:
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=110)
    return _data_url(encoded.getvalue())


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
