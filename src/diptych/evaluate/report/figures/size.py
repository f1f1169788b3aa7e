"""Figures 9, 10, 20 and 22: what size buys, in operations a picture, on average and on each dataset."""

import math
import statistics
from collections.abc import Sequence

from diptych.evaluate.references import KORNBLITH12, PAPER27, PAPER_MODELS, reference
from diptych.evaluate.report.captions import count, evaluate_command, left_out, list_few, mean, sentence
from diptych.evaluate.report.results_table import GFLOPS, Study
from diptych.evaluate.results import Protocol
from diptych.model.config import get_preset
from diptych.model.cost import image_tower
from diptych.report.charts import Chart, Guide, Mark, Missing, Plot, Series, Whose


def zero_shot_over_size(study: Study) -> Chart | Missing:
    """Figure 9: the error of zero-shot over operations, both as logarithms, with the line through them."""
    number, title = "9", "The error of zero-shot over size"
    models = [m for m in study.having("zeroshot", baselines=False) if study.models[m].gflops]
    shared = study.shared("zeroshot", models)
    command, sizes = evaluate_command(shared, several=True), len({study.models[m].gflops for m in models})
    if sizes < 2 or not shared:
        why = (
            f"models of two sizes and a dataset that they share are needed; there are {count(sizes, 'size')} and "
            f"{count(len(shared), 'shared zero-shot dataset')}"
        )
        return Missing(number=number, title=title, why=why, command=command)
    marks = tuple(
        Mark(
            x=study.models[m].gflops or 0.0,
            y=1 - mean([study.results[m, d, "zeroshot"].value for d in shared]),
            label=m,
        )
        for m in study.by_size(models)
    )
    series = (Series(name="measured", marks=marks), *_published_by_size(study, models, "zeroshot", shared, error=True))
    line = _log_log_line(marks)
    caption = sentence(
        f"Mean error over {list_few(shared)}.", f"The line falls with the power {line[1]:.2f}." if line else ""
    )
    panel = Plot(
        title=f"Mean of {len(shared)} datasets",
        x_label=GFLOPS,
        y_label="error (%)",
        x_axis="log",
        y_axis="error",
        series=series,
        guides=(line[0],) if line else (),
    )
    return Chart(
        number=number, name="zero-shot-over-size", title=title, caption=caption, panels=(panel,), command=command
    )


def probe_over_size(study: Study) -> Chart | Missing:
    """Figure 10: average of probes over operations a picture, on 12 and on 27 datasets."""
    number, title = "10", "Linear probes over size, beside other models"
    models = [m for m in study.having("probe") if study.models[m].gflops]
    command = evaluate_command(study.shared("probe", models), "probe", several=True)
    unsized = [m for m in study.having("probe") if not study.models[m].gflops]
    if not models:
        why = "no model of known size has probe results"
        return Missing(number=number, title=title, why=why, command=command)
    panels, notes = [], []
    for name, suite in (("Kornblith's 12", KORNBLITH12), ("The paper's 27", PAPER27)):
        shared = study.shared("probe", models, suite)
        if shared:
            panels.append(_probe_panel(study, models, shared, f"{name}: {len(shared)} of {len(suite)}"))
        if 0 < len(shared) < len(suite):
            notes.append(f"Of {name} there are {list_few(shared)}; published averages are over these too.")
    others = study.shared("probe", models)
    if not panels and others:
        panels.append(_probe_panel(study, models, others, f"{len(others)} datasets that all models share"))
        notes.append(f"None is of the paper's suites: {list_few(others)}.")
    if not panels:
        why = f"{list_few(models)} share no dataset with probe results"
        return Missing(number=number, title=title, why=why, command=command)
    caption = sentence(*notes, left_out(unsized, "their operations are not known"))
    return Chart(
        number=number, name="probe-over-size", title=title, caption=caption, panels=tuple(panels), command=command
    )


def _probe_panel(study: Study, models: Sequence[str], datasets: Sequence[str], title: str) -> Plot:
    def marks(baseline: bool) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                x=study.models[m].gflops or 0.0, y=mean([study.results[m, d, "probe"].value for d in datasets]), label=m
            )
            for m in study.by_size(models)
            if study.models[m].baseline == baseline
        )

    series = [
        Series(name=name, marks=marks(baseline), whose="baseline" if baseline else "ours")
        for name, baseline in (("CLIP", False), ("baselines", True))
        if marks(baseline)
    ]
    return Plot(
        title=title,
        x_label=GFLOPS,
        y_label="mean score of probes (%)",
        x_axis="log",
        y_axis="percent",
        series=(*series, *_published_by_size(study, models, "probe", datasets)),
    )


def probe_by_dataset(study: Study) -> Chart | Missing:
    """Figure 20: probes over operations, a panel for each dataset."""
    return _by_dataset(study, "20", "probe", "Linear probes over size, on each dataset", study.having("probe"))


def zero_shot_by_dataset(study: Study) -> Chart | Missing:
    """Figure 22: zero-shot over operations, a panel for each dataset, with a ResNet-50's probe to look along."""
    models = study.having("zeroshot", baselines=False)
    return _by_dataset(study, "22", "zeroshot", "Zero-shot over size, on each dataset", models)


def _by_dataset(study: Study, number: str, protocol: Protocol, title: str, having: Sequence[str]) -> Chart | Missing:
    models = [m for m in study.by_size(having) if study.models[m].gflops]
    datasets = [d for d in study.datasets(protocol) if len(_sizes(study, models, d, protocol)) > 1]
    command = evaluate_command(study.datasets(protocol), protocol, several=True)
    if not datasets:
        why = "no dataset has results of models of two sizes"
        return Missing(number=number, title=title, why=why, command=command)
    panels = []
    for dataset in sorted(datasets, key=lambda d: (d not in PAPER27, PAPER27.index(d) if d in PAPER27 else 0, d)):
        here = [m for m in models if study.get(m, dataset, protocol)]
        series = tuple(
            Series(
                name="baselines" if baseline else "CLIP",
                marks=tuple(
                    Mark(x=study.models[m].gflops or 0.0, y=study.results[m, dataset, protocol].value, label=m)
                    for m in here
                    if study.models[m].baseline == baseline
                ),
                whose="baseline" if baseline else "ours",
                joined=not baseline,
                labelled=False,
            )
            for baseline in (False, True)
        )
        panels.append(
            Plot(
                title=dataset,
                x_label="GFLOPs a picture",
                y_label=f"{study.results[here[0], dataset, protocol].metric} (%)",
                x_axis="log",
                y_axis="percent",
                series=(
                    *(one for one in series if one.marks),
                    *_published_by_size(study, here, protocol, [dataset], labelled=False),
                ),
                guides=_resnet50_guide(study, dataset, here) if protocol == "zeroshot" else (),
            )
        )
    caption = sentence(
        left_out([m for m in having if m not in models], "their operations are not known"),
        left_out([d for d in study.datasets(protocol) if d not in datasets], "models of two sizes are needed"),
    )
    return Chart(
        number=number,
        name=f"{protocol}-by-dataset",
        title=title,
        caption=caption,
        panels=tuple(panels),
        command=command,
    )


def _sizes(study: Study, models: Sequence[str], dataset: str, protocol: Protocol) -> set[float]:
    return {study.models[m].gflops or 0.0 for m in models if study.get(m, dataset, protocol)}


def _resnet50_guide(study: Study, dataset: str, models: Sequence[str]) -> tuple[Guide, ...]:
    """The probe of a ResNet-50 that was measured in the same way, from the smallest model to the largest."""
    other = study.resnet50
    probed = study.get(other, dataset, "probe") if other else None
    if probed is None or probed.metric != study.results[models[0], dataset, "zeroshot"].metric:
        return ()
    ends = [study.models[m].gflops or 0.0 for m in (models[0], models[-1])]
    return (Guide(name=f"probe on {other}", points=tuple((x, probed.value) for x in ends)),)


def _published_by_size(
    study: Study,
    models: Sequence[str],
    protocol: Protocol,
    datasets: Sequence[str],
    *,
    error: bool = False,
    labelled: bool = True,
) -> tuple[Series, ...]:
    """The paper's models, averaged over the same datasets, if it has all of them and they were measured in its way."""
    if any(study.results[model, dataset, protocol].profile != "paper" for model in models for dataset in datasets):
        return ()
    marks: dict[Whose, list[Mark]] = {"confirmed": [], "unconfirmed": []}
    for model in PAPER_MODELS:
        cells = [reference(d, model, protocol, profile="paper") for d in datasets]
        if not all(cells):
            continue
        value = mean([cell[0].value for cell in cells])
        size = image_tower(get_preset(model.partition("/")[0])).flops / 1e9
        whose = "confirmed" if all(cell[0].confirmed for cell in cells) else "unconfirmed"
        marks[whose].append(Mark(x=size, y=1 - value if error else value, label=model.partition("/")[0]))
    return tuple(
        Series(name=f"paper, {whose}", marks=tuple(some), whose=whose, labelled=labelled)
        for whose, some in marks.items()
        if some
    )


def _log_log_line(marks: Sequence[Mark]) -> tuple[Guide, float] | None:
    """The least-squares line through the logarithms, and its slope."""
    usable = [(math.log(mark.x), math.log(mark.y)) for mark in marks if mark.x > 0 and mark.y > 0]
    if len({x for x, _ in usable}) < 2:
        return None
    slope, intercept = statistics.linear_regression(*zip(*usable, strict=True))
    ends = [min(x for x, _ in usable), max(x for x, _ in usable)]
    points = tuple((math.exp(x), math.exp(slope * x + intercept)) for x in ends)
    return Guide(name=f"power {slope:.2f}", points=points), slope
