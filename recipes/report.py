"""The demo's page: what it adds to the page that every run ends with, and overview.png, the same at a glance."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray

from diptych.image import open_picture, to_rgb
from diptych.pair import Pair
from diptych.report.page import Example, Section

matplotlib.use("Agg")

_RIGHT, _WRONG = "#2d7a3e", "#b3401f"
_PALE = {_RIGHT: "#a5d3b0", _WRONG: "#eab8a6"}
_WAYS = {"image_retrieval": "text to picture", "text_retrieval": "picture to text"}


def tell_results(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[Section]:
    """What the model can name and find of what it never saw, and what was left out of its training."""
    heads = ["test", "top-1", "top-5", "chance", "times chance", "95 % interval", "classes", "pictures", ""]
    tests = [[title, *_describe_test(results[name])] for name, title in titles.items()]
    found = results["retrieval"]
    recalls = [[title, *(f"{found[f'{way}_recall@{k}']:.2%}" for k in (1, 5, 10))] for way, title in _WAYS.items()]
    dropped = [[reason.replace("_", " "), count] for reason, count in results["dropped"].items()]
    return [
        Section(
            title="What it can name",
            text=f"Trained on {results['pairs']:,} pictures and their names, then asked about pictures and words that "
            "were not among them. No label of any test was ever used.",
            table=[heads, *tests],
        ),
        Section(
            title=f"Finding a picture by its name among {found['pairs']:,} held-out ones, and back",
            table=[["direction", "recall@1", "recall@5", "recall@10"], *recalls],
        ),
        Section(title="What was left out", table=[["reason", "pictures"], *dropped]),
    ]


def _describe_test(found: Mapping[str, Any]) -> list[object]:
    low, high = found["ci95"]
    verdict = "not distinguishable from chance" if low <= found["chance"] else ""
    shares = [f"{found[name]:.2%}" for name in ("acc1", "acc5", "chance")]
    times, between = f"{found['acc1'] / found['chance']:.1f}", f"{100 * low:.2f} – {high:.2%}"
    return [*shares, times, between, found["classes"], found["images"], verdict]


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
    correct = [example for example in examples if example.is_right]
    wrong = [example for example in examples if not example.is_right]
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
