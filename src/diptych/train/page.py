"""report.html, the page that a run ends with: read from its folder, so that a resumed run tells the whole of it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from diptych.checkpoint import layouts
from diptych.checkpoint.loaded import Loaded
from diptych.config import to_dict
from diptych.image import open_picture
from diptych.report.charts import Axis, Chart, Mark, Plot, Series
from diptych.report.page import Example, Section, write_page
from diptych.shards.loader import Loader
from diptych.train.config import TrainConfig
from diptych.train.finetune.guard import COUNTS, HEADLINES
from diptych.train.finetune.wise_ft import RULE, Point
from diptych.train.run_folder.logs import METRICS
from diptych.train.run_folder.report import TrainReport

PAGE = "report.html"
Curve = Sequence[tuple[int | float, float]]
"""Step or alpha, and a value."""
SHOWN = 24
"""Pairs on the sheet."""
MARKS = 400
"""Marks of a curve at most: each is then the mean of some steps."""


def write_run_page(
    config: TrainConfig, report: TrainReport, examples: Mapping[str, Sequence[Example]], more: Sequence[Section] = ()
) -> Path:
    """Write report.html into the run's folder; `more` comes first. Returns its path."""
    steps, evaluations = read_metrics(config.out)
    answers = [
        Section(title=f"{name}: right and wrong", examples=some, text="The likeliest labels, with their probability.")
        for name, some in examples.items()
    ]
    sections = [
        *more,
        _learned(steps),
        _evaluated(evaluations),
        *answers,
        *show_pairs(config, layouts.load(report.checkpoint)),
        Section(title="Skipped samples", table=_table("reason", report.skipped) if report.skipped else ()),
        Section(title="Settings", table=_table("setting", dict(_flatten(to_dict(config))))),
    ]
    start = f", from {config.start_model}" if config.start_model else ""
    text = f"{report.samples_seen:,} pairs seen in {report.steps:,} steps{start}; the last loss is {report.loss:.4f}."
    return write_page(config.out / PAGE, f"Run {config.out.name}", text, sections)


def write_wise_ft_page(
    out: Path, start: str, tuned: str, points: Sequence[Point], best: Point, examples: Mapping[str, Sequence[Example]]
) -> Path:
    """Write report.html beside wise_ft.json: the curve, and what the best model says. Returns its path."""
    names = [name for name in points[0].metrics if name.rpartition("/")[2] not in COUNTS]
    curves = {"score": [(point.alpha, point.score) for point in points]}
    curves |= {name: [(p.alpha, p.metrics[name]) for p in points] for name in names if name.endswith(HEADLINES)}
    plot = _plot("evaluations between the two", curves, "percent", "%", x="alpha")
    rows = [[f"{p.alpha:.1f}", f"{p.score:.2%}", *(f"{p.metrics[name]:.2%}" for name in names)] for p in points]
    sections = [
        Section(
            title="The curve",
            text=f"Weights are (1 - alpha) of the start and alpha of the fine-tuned model. The best alpha is "
            f"{best.alpha:.1f}: {RULE}.",
            chart=_chart("wise-ft", plot),
            table=[["alpha", "score", *names], *rows],
        ),
        *(Section(title=f"{name}: right and wrong", examples=some) for name, some in examples.items()),
    ]
    return write_page(out / PAGE, f"Between {start} and {tuned}", f"Alpha {best.alpha:.1f} was saved.", sections)


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[tuple[int, dict[str, Any]]]]:
    """The steps of metrics.jsonl, and its evaluations with their step."""
    steps, evaluations = [], []
    with open(run / METRICS, encoding="utf-8") as log:
        for line in map(json.loads, log):
            if "evaluation" in line:
                evaluations.append((line["step"], line["evaluation"]))
            else:
                steps.append(line)
    return steps, evaluations


@torch.inference_mode()
def show_pairs(config: TrainConfig, loaded: Loaded) -> list[Section]:
    """Some pairs as the model is shown them, and how alike it finds each picture and each caption."""
    size = min(SHOWN, config.loader.batch_size)
    loader = Loader(
        config.data,
        replace(config.loader, batch_size=size, workers=0),
        loaded.preprocess.image_size,
        loaded.tokenizer,
        prepare=lambda data: loaded.preprocess.pixels(open_picture(data)),
    )
    batches = iter(loader)
    batch = next(batches)
    batches.close()
    pictures = [np.ascontiguousarray(pixels) for pixels in batch.image.numpy().transpose(0, 2, 3, 1)]
    pairs = list(zip(pictures, map(loaded.tokenizer.decode, batch.text), strict=True))
    image = loaded.model.encode_image(loaded.preprocess.normalize(batch.image))
    text = loaded.model.encode_text(batch.text)
    similarity = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).numpy()
    return [
        Section(
            title="Training pairs",
            text="Pictures and captions as the model is shown them: cropped, in lower case, cut where they are too "
            "long. A caption that says nothing of its picture can be seen here.",
            pairs=pairs,
        ),
        Section(
            title="The diagonal",
            text="How alike the model finds each of these pictures and each caption (cosine similarity, "
            f"{similarity.min():.2f} to {similarity.max():.2f}). Training pulls the diagonal up and the rest down.",
            pairs=pairs,
            similarity=similarity,
        ),
    ]


def _learned(steps: Sequence[Mapping[str, Any]]) -> Section:
    named = {"loss": "loss", "lr": "learning rate", "logit_scale": "logit scale (1 / temperature)"}
    plots = [
        _plot(title, {title: [(s["step"], s[name]) for s in steps]}, "number", "") for name, title in named.items()
    ]
    return Section(title="How it learned", chart=_chart("learned", *plots) if steps else None)


def _evaluated(evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> Section:
    """Headlines over the steps, and all shares of the first and the last evaluation."""
    if not evaluations:
        return Section(title="Evaluations")
    (first, before), (last, now) = evaluations[0], evaluations[-1]
    shares = [name for name in now if name.rpartition("/")[2] not in COUNTS]
    heads = [name for name in shares if name.endswith(HEADLINES)] or shares
    curves = {name: [(step, found[name]) for step, found in evaluations if name in found] for name in heads}
    rows = [[name, f"{before.get(name, math.nan):.2%}", f"{now[name]:.2%}"] for name in shares]
    return Section(
        title="Evaluations",
        chart=_chart("evaluations", _plot("evaluations", curves, "percent", "%")) if len(evaluations) > 1 else None,
        table=[["metric", f"at step {first:,}", f"at step {last:,}"], *rows],
    )


def _chart(name: str, *plots: Plot) -> Chart:
    titles = ", ".join(plot.title for plot in plots)
    return Chart(number="", name=name, title=titles, caption=titles, panels=plots, command="")


def _plot(title: str, curves: Mapping[str, Curve], axis: Axis, unit: str, x: str = "step") -> Plot:
    series = tuple(Series(name=name, marks=_thin(marks), joined=True, labelled=False) for name, marks in curves.items())
    return Plot(title=title, x_label=x, y_label=unit, x_axis="number", y_axis=axis, series=series)


def _thin(marks: Curve) -> tuple[Mark, ...]:
    """At most MARKS marks, each the mean of as many neighbours."""
    size = max(1, math.ceil(len(marks) / MARKS))
    groups = [marks[i : i + size] for i in range(0, len(marks), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return tuple(Mark(x=x, y=y) for x, y in means)


def _table(name: str, values: Mapping[str, Any]) -> list[list[object]]:
    return [[name, ""], *([key, value] for key, value in values.items())]


def _flatten(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, one in enumerate(value):
                yield from _flatten(one, f"{before}{name}[{number}].")
        elif value is not None:
            yield f"{before}{name}", value
