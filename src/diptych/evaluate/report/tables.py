"""The report's tables of single protocols: calibration, retrieval, probes, overlap, robustness, groups of people."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.evaluate.metrics.bias import PROBE
from diptych.evaluate.metrics.overlap import bonferroni
from diptych.evaluate.metrics.robustness import IMAGENET, effective_robustness, fit_shift, relative_robustness
from diptych.evaluate.references import OTHERS, PAPER27, SHIFTS, Reference, load_references, reference
from diptych.evaluate.report.results_table import PROTOCOL_OF_SHIFT, Study
from diptych.evaluate.results import Result

WAYS = tuple(f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text."""

    title: str
    note: str = ""
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def build_tables(study: Study) -> list[Table]:
    """The tables that have rows."""
    tables = (
        calibration(study),
        retrieval(study),
        probes(study),
        overlaps(study),
        robustness(study),
        *groups_of_people(study),
        published_elsewhere(study),
    )
    return [table for table in tables if table.rows]


def calibration(study: Study) -> Table:
    """How far confidence is from accuracy."""
    rows = [
        (result.dataset, result.model, *(_number(result.details.get(name)) for name in ("ece", "nll", "temperature")))
        for result in _of(study, "zeroshot")
        if result.details.get("ece") is not None
    ]
    return Table(
        title="Calibration of zero-shot",
        note="Expected calibration error (0 is perfect), negative log likelihood, and the temperature by which logits "
        "would have to be divided to make it smallest, looked for between 0.01 and 100.",
        heads=("dataset", "model", "calibration error", "negative log likelihood", "temperature"),
        rows=rows,
    )


def retrieval(study: Study) -> Table:
    """All recalls, and below each model what is published of it."""
    rows: list[tuple[str, ...]] = []
    for result in _of(study, "retrieval"):
        rows.append((result.dataset, result.model, *(_percent(result.metrics.get(way)) for way in WAYS)))
        for profile, whose in (("paper", "the paper"), ("clip_benchmark", "OpenCLIP")):
            name = study.names.get(result.model, "")
            found = {r.metric: r for r in reference(result.dataset, name, "retrieval", profile=profile)}
            if any(way in found for way in WAYS):
                cells = [
                    (_percent(found[way].value), found[way].confirmed) if way in found else ("", True) for way in WAYS
                ]
                marked = (text if confirmed else f"{text}?" for text, confirmed in cells)
                rows.append(("", f"{name}, published by {whose}", *marked))
    heads = [f"{way} R@{k}" for way in ("picture to text", "text to picture") for k in (1, 5, 10)]
    return Table(title="Retrieval", heads=("dataset", "model", *heads), rows=rows)


def probes(study: Study) -> Table:
    """Accuracy, L2 strength and training set of each probe."""
    rows = [
        (
            result.dataset,
            result.model,
            _percent(result.value),
            _number(result.details.get("l2")),
            f"{len(result.details.get('validation', ()))}",
            f"{result.details['train_images']:,}",
            "yes" if result.details.get("converged", True) else "no",
        )
        for result in _of(study, "probe")
    ]
    heads = ("dataset", "model", "value %", "strength", "strengths tried", "training pictures", "converged")
    return Table(title="Linear probes", heads=heads, rows=rows)


def overlaps(study: Study) -> Table:
    """Section 5, corrected over the datasets of each model."""
    rows: list[tuple[str, ...]] = []
    for model in study.models:
        found = [result for result in _of(study, "overlap") if result.model == model]
        corrected = bonferroni([float(result.details["p_value"]) for result in found])
        for result, p in zip(found, corrected, strict=True):
            details = result.details
            low, high = details["interval"]
            rows.append(
                (
                    result.dataset,
                    model,
                    f"{details['overlapping']:,} of {result.images:,}",
                    _percent(details["share"]),
                    *(_percent(details[name]) for name in ("acc_all", "acc_clean", "acc_overlap")),
                    f"{_percent(low)} to {_percent(high)}",
                    f"{100 * details['gained']:+.2f}" if details["gained"] is not None else "",
                    f"{details['p_value']:.3g}",
                    f"{p:.3g}",
                )
            )
    heads = (
        "dataset",
        "model",
        "seen",
        "seen %",
        "all %",
        "unseen %",
        "of seen %",
        "99.5 % interval",
        "gained",
        "p",
        "p, corrected",
    )
    note = "p: chance of as many hits on seen pictures if they were as hard as the rest; corrected by Bonferroni."
    return Table(title="Overlap with the training pictures", note=note, heads=heads, rows=rows)


def robustness(study: Study) -> Table:
    """Effective robustness where a line can be fitted; relative robustness of probes trained on ImageNet."""
    rows: list[tuple[str, ...]] = []
    for model in study.models:
        for shift in SHIFTS:
            natural, on_imagenet = study.get(model, shift, PROTOCOL_OF_SHIFT[shift]), study.imagenet(model, shift)
            if natural is None or on_imagenet is None:
                continue
            line, probed = fit_shift(study.table, shift), study.get(model, shift, "probe")
            adapted = probed is not None and probed.details.get("trained_on") == IMAGENET
            rows.append(
                (
                    shift,
                    model,
                    _percent(on_imagenet),
                    _percent(natural.value),
                    f"{100 * effective_robustness(line, on_imagenet, natural.value):+.2f}" if line else "",
                    f"{100 * relative_robustness(natural.value, probed.value):+.2f}" if adapted and probed else "",
                )
            )
    note = (
        "Effective: above the line of ImageNet models of the table that was given, in logits. Relative: what a probe "
        "trained on ImageNet changes."
    )
    heads = ("shift", "model", "ImageNet %", "under shift %", "effective, points", "relative, points")
    return Table(title="Robustness to natural shifts", note=note, heads=heads, rows=rows)


def published_elsewhere(study: Study) -> Table:
    """Numbers of the paper about others than its models: people, Visual N-Grams, other training sets; beside each what
    was measured here on the same dataset in the same way, the best of it."""
    datasets = {dataset for _, dataset, _ in study.results}
    datasets |= {"average_27"} if datasets & set(PAPER27) else set()
    shown = [found for found in load_references(OTHERS) if found.dataset in datasets]
    rows = []
    for found in sorted(shown, key=lambda found: (found.source, found.dataset, found.protocol, found.model)):
        here = [r for r in _of(study, found.protocol) if r.dataset == found.dataset and r.metric == found.metric]
        best = max(here, key=lambda result: result.value, default=None)
        ours = "" if best is None else f"{_percent(best.value)} ({best.model})"
        rows.append((found.source, found.dataset, found.protocol, found.metric, found.model, _published(found), ours))
    heads = ("source", "dataset", "protocol", "metric", "who", "published %", "measured here, best %")
    note = "average_27: the mean over the paper's 27 datasets (Table 12: one ResNet-50, trained on YFCC or on WIT)."
    return Table(title="Published of others", note=note, heads=heads, rows=rows)


def groups_of_people(study: Study) -> Iterator[Table]:
    """Section 7's probes, a table for each model and each thing that was counted."""
    for result in _of(study, "bias"):
        for name, attributes in _walk(result.details.get("groups", {})):
            rows = [
                (
                    attribute,
                    group,
                    f"{rate['hits']:,} of {rate['pictures']:,}",
                    _percent(rate["share"]),
                    f"{_percent(rate['interval'][0])} to {_percent(rate['interval'][1])}",
                )
                for attribute, groups in attributes.items()
                for group, rate in groups.items()
            ]
            yield Table(
                title=f"Probe of bias: {name.replace('_', ' ')}, {result.model} on {result.dataset}",
                note=PROBE,
                heads=("by", "group", "pictures", "share %", "95 % interval"),
                rows=rows,
            )


def _walk(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Flatten nested rates: name of the count -> attribute -> group -> rate."""
    for name, attributes in found.items():
        if all(isinstance(groups, Mapping) for groups in attributes.values()):
            yield name, attributes


def _of(study: Study, protocol: str) -> list[Result]:
    found = [result for (_, _, p), result in study.results.items() if p == protocol]
    return sorted(found, key=lambda result: (result.dataset, result.model))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _published(found: Reference) -> str:
    """Its percent, with a question mark if it is not confirmed."""
    return _percent(found.value) + ("" if found.confirmed else "?")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
