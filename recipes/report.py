"""The demo's report: one HTML file with its pictures inside."""

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
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diptych import files
from diptych.image import Picture, open_picture, to_rgb
from diptych.pair import Pair

matplotlib.use("Agg")

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
    """Write `report.html` into the run's folder."""
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
