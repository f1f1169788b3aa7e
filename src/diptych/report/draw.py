"""Charts as pictures, by matplotlib (the extra `report`): one style for all, and the same bytes for the same numbers.

What was measured here is filled; what is published is hollow: a diamond where it is confirmed, else a square.
"""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from diptych import files
from diptych.report.charts import Axis, Bars, Chart, Guide, Plot, Series, Whose

OURS = ("#2457a6", "#2d7a3e", "#7b3fa0", "#00838f", "#c2185b", "#5d4037", "#455a64", "#827717", "#e65100")
BASELINES = ("#b5541c", "#a1887f", "#d4a017", "#8d6e63", "#bf8f6f")
PUBLISHED: dict[Whose, tuple[str, str]] = {"confirmed": ("#1c1c1c", "D"), "unconfirmed": ("#8a8a8a", "s")}
"""Colour of the edge, and shape; never filled."""
WIDTH, HEIGHT = 6.4, 4.8
"""Inches of a panel."""
MANY = 10
"""From so many panels on they stand four in a row, half as large, under one legend."""
MANY_MARKS = 40
"""Marks from which a line has none."""
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
}
_DASHES = ((5.0, 3.0), (1.0, 1.5))
"""Dashes of the first and the second guide."""
_OFFSETS = ((5, 4), (5, -10), (-5, 4), (-5, -10), (5, 14), (5, -20), (-5, 14), (-5, -20))
"""Where a label may stand beside its mark, in points; negative: it ends there."""


def draw_svg(chart: Chart) -> bytes:
    """A chart as SVG."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"diptych-{chart.name}"}):
        return _save(_draw(chart), "svg", {"Date": None, "Creator": "diptych"})


def draw_png(chart: Chart) -> bytes:
    """A chart as PNG."""
    with matplotlib.rc_context(_STYLE):
        return _save(_draw(chart), "png", {"Software": "diptych"})


def save_charts(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write every chart as PNG and SVG, named after its number and name."""
    files.make_folder(folder, flag="--figures")
    paths = []
    for chart in charts:
        for suffix, draw in (("png", draw_png), ("svg", draw_svg)):
            paths.append(folder / f"figure-{chart.number}-{chart.name}.{suffix}")
            files.write_bytes(paths[-1], draw(chart))
    return paths


def _save(figure: Figure, kind: str, metadata: dict) -> bytes:
    encoded = io.BytesIO()
    figure.savefig(encoded, format=kind, dpi=130, metadata=metadata)
    return encoded.getvalue()


def _draw(chart: Chart) -> Figure:
    many = len(chart.panels) >= MANY
    columns = 4 if many else min(2, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    heights = [_height(panel) / (2 if many else 1) for panel in chart.panels]
    of_rows = [max(heights[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure = Figure(figsize=(WIDTH * min(2, columns), sum(of_rows)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=of_rows)
    places = list(grid.flat)
    for axes, panel in itertools.zip_longest(places, chart.panels):
        if panel is None:
            axes.set_axis_off()
        elif isinstance(panel, Bars):
            _draw_bars(axes, panel)
        else:
            _draw_plot(axes, panel)
    if many:
        _share_legend(figure, places[: len(chart.panels)])
    figure.draw_without_rendering()  # labels need to know where marks will be
    for axes, panel in zip(places, chart.panels, strict=False):
        if isinstance(panel, Plot):
            _label_marks(axes, panel)
    return figure


def _share_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend instead of one in each panel."""
    shown = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        shown |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in shown}
        if (legend := axes.get_legend()) is not None:
            legend.remove()
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown))


def _height(panel: Plot | Bars) -> float:
    return max(2.2, 0.24 * len(panel.bars) + 1.4) if isinstance(panel, Bars) else HEIGHT


def _draw_bars(axes: Axes, panel: Bars) -> None:
    scale = 1.0 if panel.axis == "log" else 100.0
    places = range(len(panel.bars))
    values = [scale * bar.value for bar in panel.bars]
    colours = [OURS[0] if value >= 0 else BASELINES[0] for value in values]
    axes.barh(places, values, color=colours, height=0.66)
    for place, bar in zip(places, panel.bars, strict=True):
        if bar.low is not None and bar.high is not None:
            axes.plot([scale * bar.low, scale * bar.high], [place, place], color="#1c1c1c", linewidth=1)
    for whose in ("confirmed", "unconfirmed"):
        marks = [
            (scale * bar.published, place)
            for place, bar in zip(places, panel.bars, strict=True)
            if bar.published is not None and bar.confirmed == (whose == "confirmed")
        ]
        if marks:
            edge, shape = PUBLISHED[whose]
            x, y = zip(*marks, strict=True)
            axes.plot(x, y, shape, markerfacecolor="none", markeredgecolor=edge, label=f"paper, {whose}")
    for number, guide in enumerate(panel.guides):
        colour = PUBLISHED[guide.whose][0] if guide.whose in PUBLISHED else "#1c1c1c"
        axes.axvline(scale * (guide.at or 0.0), color=colour, linewidth=1, dashes=(4, 2 + 2 * number), label=guide.name)
    axes.set_yticks(places, [bar.label for bar in panel.bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if panel.axis == "log":
        axes.set_xscale("log")
        low, high = min([1.0, *(0.8 * value for value in values)]), 1.6 * max(values)
        axes.set_xlim(low, high)
        _set_ticks(axes.xaxis, _log_ticks(low, high), scale=1.0)
    else:
        axes.axvline(0, color="#1c1c1c", linewidth=0.8)
        axes.margins(x=0.14)
    for place, value in zip(places, values, strict=True):
        text = f"{value:.1f}" if panel.axis == "log" else f"{value:+.1f}"
        side = {"ha": "left", "xytext": (3, 0)} if value >= 0 else {"ha": "right", "xytext": (-3, 0)}
        axes.annotate(text, (value, place), textcoords="offset points", va="center", fontsize=7, **side)
    axes.set(title=panel.title, xlabel=panel.x_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")  # bars are sorted, so that corner is empty


def _draw_plot(axes: Axes, panel: Plot) -> None:
    for guide, dashes in zip(panel.guides, itertools.cycle(_DASHES)):
        _draw_guide(axes, panel, guide, dashes)
    palettes = {"ours": itertools.cycle(OURS), "baseline": itertools.cycle(BASELINES)}
    colours: dict[str, str] = {}
    for series in panel.series:
        if series.whose in PUBLISHED:
            edge, shape = PUBLISHED[series.whose]
            look = {"marker": shape, "markerfacecolor": "none", "markeredgecolor": edge, "color": edge, "markersize": 6}
        else:
            family = series.family or series.name
            colour = colours[family] = colours.get(family) or next(palettes[series.whose])
            alone = bool(series.family) and not series.joined  # beside a line of the same colour
            shape = "*" if alone else "o" if series.whose == "ours" else "^"
            small = not series.labelled and not series.joined
            size = 12 if alone else 4 if small else 6
            look = {"marker": shape, "color": colour, "markersize": size, "alpha": 0.6 if small else 1.0}
        _draw_series(axes, panel, series, look)
    _set_axis(axes, "x", panel.x_axis, panel)
    _set_axis(axes, "y", panel.y_axis, panel)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.legend(loc="best")


def _draw_series(axes: Axes, panel: Plot, series: Series, look: dict) -> None:
    x = [_place(panel.x_axis, mark.x) for mark in series.marks]
    y = [_place(panel.y_axis, mark.y) for mark in series.marks]
    style = "-" if series.joined else "none"
    if series.joined and len(x) > MANY_MARKS:
        look = look | {"marker": "none"}
    axes.plot(x, y, label=series.name, linestyle=style, linewidth=1.4, **look)
    for at, mark in zip(x, series.marks, strict=True):
        if mark.low is not None and mark.high is not None:
            ends = [_place(panel.y_axis, end) for end in (mark.low, mark.high)]
            if panel.y_axis == "logit":
                ends = [min(max(end, 0.001), 0.999) for end in ends]
            axes.plot([at, at], ends, color=look["color"], linewidth=0.9, alpha=0.7)


def _draw_guide(axes: Axes, panel: Plot, guide: Guide, dashes: tuple[float, float]) -> None:
    points = [(_place(panel.x_axis, x), _place(panel.y_axis, y)) for x, y in guide.points]
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color="#6b6b6b", linewidth=1, dashes=dashes, label=guide.name, scalex=False, scaley=False)


def _place(axis: Axis, value: float) -> float:
    """Where a value stands on its axis."""
    if axis in ("percent", "points", "share"):
        return 100 * value
    if axis == "shots":
        return math.log2(value) if value else -1.0
    return value


def _set_axis(axes: Axes, which: Literal["x", "y"], kind: Axis, panel: Plot) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    values = [mark.x if which == "x" else mark.y for series in panel.series for mark in series.marks]
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    if kind == "logit":
        set_scale("logit")
        low, high = max(0.005, min(values) * 0.8), min(0.995, 1 - (1 - max(values)) * 0.8)
        set_limits(low, high)
        _set_ticks(axis, [tick for tick in _TICKS if low <= tick <= high] or [min(values)])
    elif kind in ("log", "error"):
        set_scale("log")
        low, high = min(values) / 1.3, max(values) * 1.3
        set_limits(low, min(1.0, high) if kind == "error" else high)
        if kind == "error":
            _set_ticks(axis, [tick for tick in _TICKS if low <= tick <= high] or values[:1])
        else:
            _set_ticks(axis, _log_ticks(low, high), scale=1.0)
    elif kind == "shots":
        shown = sorted(set(values))
        axes.set_xticks([_place("shots", value) for value in shown], [f"{value:g}" for value in shown])


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends: decades, or 1, 2 and 5 of each; the middle if none lies there."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        if len(inside := [tick for tick in ticks if low <= tick <= high]) >= 3:
            return inside
    return inside if len(inside) > 1 else [float(f"{low * (high / low) ** share:.2g}") for share in (0.25, 0.75)]


def _set_ticks(axis, ticks: Sequence[float], scale: float = 100.0) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{scale * value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _label_marks(axes: Axes, panel: Plot) -> None:
    """Labels beside their marks, each at the first place inside the axes where it covers no other one."""
    taken: list[tuple[float, float, float, float]] = []
    left, right = float(axes.bbox.x0), float(axes.bbox.x1)
    scale = axes.figure.dpi / 72
    for series in panel.series:
        for mark in series.marks if series.labelled else ():
            if not mark.label:
                continue
            place = (_place(panel.x_axis, mark.x), _place(panel.y_axis, mark.y))
            x, y = (float(at) for at in axes.transData.transform(place))
            boxes = [_box(x, y, offset, mark.label, scale) for offset in _OFFSETS]
            inside = [i for i, box in enumerate(boxes) if left <= box[0] and box[2] <= right]
            free = [i for i in inside if not any(_overlap(boxes[i], other) for other in taken)]
            chosen = [*free, *inside, 0][0]
            taken += [boxes[chosen], (x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale)]
            side = "left" if _OFFSETS[chosen][0] > 0 else "right"
            axes.annotate(
                mark.label,
                place,
                xytext=_OFFSETS[chosen],
                textcoords="offset points",
                ha=side,
                fontsize=7,
                color="#555555" if series.whose in PUBLISHED else "#1c1c1c",
            )


def _box(x: float, y: float, offset: tuple[int, int], label: str, scale: float) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a label of 7 points, in pixels; about."""
    width = 3.9 * len(label) * scale
    left = x + offset[0] * scale - (0 if offset[0] > 0 else width)
    bottom = y + offset[1] * scale
    return left, bottom, left + width, bottom + 8 * scale


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
