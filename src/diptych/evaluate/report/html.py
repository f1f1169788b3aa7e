"""One HTML file of a results folder: every number beside what is published, and the figures inside; nothing is fetched.

load_study -> describe (plain values, tested) -> the template -> report.html
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych import files
from diptych.errors import UsageError, install
from diptych.evaluate.metrics.measures import wilson_interval
from diptych.evaluate.references import KORNBLITH12, PAPER27, caveats, reference
from diptych.evaluate.report.captions import count, mean
from diptych.evaluate.report.figures.build import build_charts
from diptych.evaluate.report.results_table import OF_PAPER, Study
from diptych.evaluate.report.tables import build_tables
from diptych.evaluate.results import PROTOCOLS, Result
from diptych.report.charts import Chart, Missing
from diptych.report.page import data_url, render

NEAR = 0.01
"""A difference that counts as reproduced."""
SHOWN_CLASSES = 5
"""Best and worst classes of a set that are listed."""
SHOWN_PAIRS = 10
"""Pairs of classes that are taken for each other most, of a set whose classes are too many for a matrix."""
MATRIX = 30
"""Classes of which the whole confusion matrix is shown."""
SUITES: Mapping[str, Sequence[str]] = {"kornblith12": KORNBLITH12, "paper27": PAPER27}
NOT_SHOWN = ("source", "data", "seconds", "settings")
"""Details of a result that a report leaves out: places on a machine, clocks and hashes."""
ABOUT: Mapping[str, str] = {
    "zeroshot": "Class names in templates, no labelled picture (section 3.1).",
    "prompts": "Templates found by forward selection; figure 4 has bare names and the whole ensemble.",
    "retrieval": "Pictures among captions and captions among pictures (Table 13).",
    "probe": "Logistic regression on features before the projection, its strength searched for (A.3).",
    "fewshot": "The same on a few pictures of each class; the value is that of most shots.",
    "temporal": "Frames of videos: right on the anchor (pm0), on all frames around it too (pm10).",
    "bias": "Section 7's probes. No reproduction: prompts and settings of the paper are not published.",
    "overlap": "Accuracy with and without pictures that were seen in training (section 5).",
}


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Files that were written, and counts."""

    html: Path
    figures: tuple[Path, ...]
    drawn: tuple[str, ...]
    """Numbers of the figures."""
    missing: tuple[Missing, ...]
    own: bool
    """Whether none of the paper's datasets was measured, so that most of its figures are not to be expected."""
    results: int


def write_report(study: Study, out: Path, *, title: str, command: str, figures: Path | None = None) -> ReportFiles:
    """Write the report, and with `figures` a folder of PNG and SVG.

    Raises UsageError if the extra `report` is not installed.
    """
    try:
        from diptych.report.draw import draw_svg, save_charts
    except ModuleNotFoundError as error:
        raise UsageError(f"the report needs {error.name}, which is not installed; {install('report')}") from None
    charts, missing = build_charts(study)
    shown = describe(study, charts, missing, draw_svg)
    html = render("report.html.j2", title=title, command=command, **shown)
    if out.is_dir():
        raise UsageError(f"{out} is a folder; the report is one file: name it in --out, such as {out / 'report.html'}")
    files.make_folder(out.parent)
    files.write_bytes(out, html.encode())
    return ReportFiles(
        html=out,
        figures=tuple(save_charts(charts, figures)) if figures else (),
        drawn=tuple(chart.number for chart in charts),
        missing=tuple(missing),
        own=study.is_own,
        results=len(study.results),
    )


def describe(
    study: Study, charts: Sequence[Chart], missing: Sequence[Missing], draw: Callable[[Chart], bytes]
) -> dict[str, Any]:
    """Fields of the template, as text."""
    return {
        "size": f"{count(len(study.results), 'result')} of {count(len(study.models), 'model')} on "
        f"{count(len({dataset for _, dataset, _ in study.results}), 'dataset')}",
        "models": [_model(study, name) for name in study.models],
        "averages": list(_averages(study)),
        "sections": list(_sections(study)),
        "tables": build_tables(study),
        "classes": list(_classes(study)),
        "confusions": list(_confusions(study)),
        "figures": [
            {
                "number": chart.number,
                "title": chart.title,
                "caption": chart.caption,
                "command": chart.command,
                "picture": data_url(draw(chart), "image/svg+xml"),
            }
            for chart in charts
        ],
        "missing": missing,
        "own": study.is_own,
        "caveats": _caveats(study),
        "environment": _environment(study),
    }


def _model(study: Study, name: str) -> dict[str, Any]:
    facts = study.models[name]
    return {
        "name": name,
        "source": without_folder(facts.source),
        "published": study.names.get(name),
        "baseline": facts.baseline,
        "image_size": facts.image_size,
        "embed_dim": facts.embed_dim,
        "parameters": "" if facts.parameters is None else f"{facts.parameters / 1e6:,.1f} M",
        "gflops": "" if facts.gflops is None else f"{facts.gflops:.4g}",
    }


def _averages(study: Study) -> Iterator[dict[str, Any]]:
    """Averages over the two suites, for every model that has at least one of their datasets."""
    for protocol in ("zeroshot", "probe"):
        for suite, datasets in SUITES.items():
            for model in study.having(protocol):
                there = [d for d in datasets if (model, d, protocol) in study.results]
                if not there:
                    continue
                value = mean([study.results[model, d, protocol].value for d in there])
                published = [study.paper(model, d, protocol) for d in there]
                known = [one for one in published if one]
                whole = len(known) == len(there)
                average = mean([one.value for one in known]) if whole else None
                yield {
                    "model": model,
                    "protocol": protocol,
                    "suite": suite,
                    "there": len(there),
                    "all": len(datasets),
                    "value": percent(value),
                    "published": "" if average is None else percent(average),
                    "confirmed": whole and all(one.confirmed for one in known),
                    "delta": "" if average is None else points(value - average),
                }


def _sections(study: Study) -> Iterator[dict[str, Any]]:
    for protocol in PROTOCOLS:
        found = [result for (_, _, p), result in study.results.items() if p == protocol]
        if found:
            found.sort(key=lambda result: (result.dataset, result.model))
            rows = [_row(study, result) for result in found]
            published = any(row["published"] for row in rows)
            yield {"protocol": protocol, "about": ABOUT[protocol], "rows": rows, "published": published}


def _row(study: Study, result: Result) -> dict[str, Any]:
    compared = study.published(result)
    row = {
        "dataset": result.dataset,
        "model": result.model,
        "profile": result.profile,
        "metric": result.metric,
        "images": f"{result.images:,}",
        "value": percent(result.value),
        "interval": interval(result.ci95),
        "chance": "" if result.chance is None else percent(result.chance),
        "warnings": list(result.warnings),
        "skipped": ", ".join(f"{reason} {count:,}" for reason, count in result.skipped.items() if count),
        "published": "",
        "confirmed": False,
        "delta": "",
        "tone": "other",
        "source": "",
        "caveats": [],
    }
    if compared is None:
        return row
    found, close = compared.reference, abs(compared.delta) <= NEAR
    other = "" if found.metric == result.metric else f" ({found.metric})"
    return row | {
        "published": percent(found.value) + other,
        "confirmed": found.confirmed,
        "delta": points(compared.delta) if compared.comparable else f"({points(compared.delta)})",
        "tone": ("near" if close else "far") if compared.comparable else "other",
        "source": found.source + ("" if compared.comparable else f"; {found.profile}'s prompts and splits"),
        "caveats": [caveat.text for caveat in compared.caveats],
    }


def _classes(study: Study) -> Iterator[dict[str, Any]]:
    """The classes that go best and worst, with Wilson's interval of their recall."""
    for (model, dataset, protocol), result in sorted(study.results.items()):
        measure = "recall" if any("recall" in one for one in result.per_class) else "average_precision"
        known = [one for one in result.per_class if one.get(measure) is not None]
        if len(known) < 2:
            continue
        ordered = sorted(known, key=lambda one: (-one[measure], one["name"]))
        few = len(ordered) <= 2 * SHOWN_CLASSES
        yield {
            "model": model,
            "dataset": dataset,
            "protocol": protocol,
            "count": len(result.per_class),
            "measure": measure.replace("_", " "),
            "best": [_class(one, measure) for one in (ordered if few else ordered[:SHOWN_CLASSES])],
            "worst": [] if few else [_class(one, measure) for one in ordered[-SHOWN_CLASSES:]],
        }


def _class(one: Mapping[str, Any], measure: str) -> dict[str, str]:
    ends = wilson_interval(float(one[measure]), int(one["images"])) if measure == "recall" else None
    return {
        "name": str(one["name"]),
        "images": f"{one['images']:,}",
        "value": percent(one[measure]),
        "interval": interval(ends),
    }


def _confusions(study: Study) -> Iterator[dict[str, Any]]:
    """What is taken for what, of datasets of one's own: the matrix, or of many classes the most frequent pairs."""
    for (model, dataset, protocol), result in sorted(study.results.items()):
        table, names = result.details.get("confusion"), [str(one["name"]) for one in result.per_class]
        if table is None or dataset in OF_PAPER:
            continue
        wrong = [(n, i, j) for i, row in enumerate(table) for j, n in enumerate(row) if n and i != j]
        frequent = sorted(wrong, key=lambda pair: (-pair[0], pair[1:]))[:SHOWN_PAIRS]
        shares = [[n / max(1, sum(row)) for n in row] for row in table] if len(names) <= MATRIX else []
        yield {
            "model": model,
            "dataset": dataset,
            "protocol": protocol,
            "names": names,
            "rows": [
                [(f"{n:,}" if n else "", f"{share:.2f}") for n, share in zip(*both, strict=True)]
                for both in zip(table, shares, strict=False)
            ],
            "pairs": [] if shares else [(names[i], names[j], f"{n:,} of {sum(table[i]):,}") for n, i, j in frequent],
        }


def _caveats(study: Study) -> list[Any]:
    """Caveats of the datasets that are here, for models whose numbers are published; each once."""
    found = [
        caveat
        for model, dataset, protocol in sorted(study.results)
        if (name := study.names.get(model)) and reference(dataset, name, protocol)
        for caveat in caveats(dataset, name, protocol)
    ]
    return list(dict.fromkeys(found))


def _environment(study: Study) -> list[tuple[str, str]]:
    """Settings and versions that results were made with; values that differ stand side by side.

    Where data and models lay is left out, since a report travels.
    """
    values: dict[str, dict[str, None]] = {}
    for _, result in sorted(study.results.items()):
        for name, value in result.about.items():
            if name not in NOT_SHOWN and isinstance(value, str | int | float | bool):
                values.setdefault(name, {})[str(value)] = None
    rows = []
    for name, some in values.items():
        texts = sorted(some)
        if name == "date":
            texts = list(dict.fromkeys((texts[0], texts[-1])))
        more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
        rows.append((name, (" to " if name == "date" else ", ").join(texts[:5]) + more))
    return rows


def without_folder(source: str) -> str:
    """A place on this machine by its name only; anything else as it is."""
    return Path(source).name if Path(source).is_absolute() else source


def percent(share: float) -> str:
    """12.34."""
    return f"{100 * share:.2f}"


def points(difference: float) -> str:
    """+1.23."""
    return f"{100 * difference:+.2f}"


def interval(ends: tuple[float, float] | None) -> str:
    """12.34 to 15.67."""
    return "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"
