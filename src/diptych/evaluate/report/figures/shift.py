"""Figures 12 to 17: robustness to other tasks and to natural shifts, adaptation, overlap.

A probe that was trained on ImageNet and asked about a shift is a result of the shift, protocol `probe` or `fewshot`,
with `details["trained_on"] = "imagenet"`: the shifts have no training pictures of their own. A zero-shot result of a
shift may have `metrics["acc1_pooled"]`: all classes of ImageNet were asked, and each class of the shift takes the best
of its own.
"""

import math
from collections.abc import Sequence

from diptych.evaluate.metrics.overlap import bonferroni
from diptych.evaluate.metrics.robustness import IMAGENET, Line, effective_robustness, fit_line, fit_shift
from diptych.evaluate.references import KORNBLITH12, PAPER27, SHIFTS, reference
from diptych.evaluate.report.captions import evaluate_command, list_few, mean, sentence
from diptych.evaluate.report.results_table import PROTOCOL_OF_SHIFT, Study
from diptych.evaluate.results import Protocol
from diptych.report.charts import Bar, Bars, Chart, Guide, Mark, Missing, Plot, Series, Whose

POOLED = "acc1_pooled"
SHIFTS_COMMAND = "diptych evaluate --model MODEL --suite imagenet shifts"


def task_shift(study: Study) -> Chart | Missing:
    """Figure 12: probes on other datasets over the probe on ImageNet."""
    number, title = "12", "Probes on other tasks over the probe on ImageNet"
    command = evaluate_command((), "probe", several=True)
    models = [model for model in study.having("probe") if study.get(model, IMAGENET, "probe")]
    others = [name for name in PAPER27 if name != IMAGENET]
    panels, used = [], set()
    for name, suite in (("Kornblith's 12", KORNBLITH12), ("The paper's other 26", others)):
        shared = study.shared("probe", models, suite) if models else ()
        if shared:
            used.update(shared)
            panels.append(_task_panel(study, models, shared, f"{name}: {len(shared)} of {len(suite)}"))
    if not panels:
        why = (
            f"the models with a probe on ImageNet ({list_few(models)}) share no other probe on a dataset of the paper"
            if models
            else "no model has a probe on ImageNet"
        )
        return Missing(number=number, title=title, why=why, command=command)
    caption = sentence(
        "Above the diagonal a model's features are worth more on other tasks than on ImageNet.",
        f"Mean over {list_few(sorted(used))}.",
    )
    return Chart(number=number, name="task-shift", title=title, caption=caption, panels=tuple(panels), command=command)


def _task_panel(study: Study, models: Sequence[str], datasets: Sequence[str], title: str) -> Plot:
    def marks(baseline: bool) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                x=study.results[m, IMAGENET, "probe"].value,
                y=mean([study.results[m, d, "probe"].value for d in datasets]),
                label=m,
            )
            for m in models
            if study.models[m].baseline == baseline
        )

    return Plot(
        title=title,
        x_label="ImageNet (%)",
        y_label="mean of the other datasets (%)",
        x_axis="logit",
        y_axis="logit",
        series=_both(marks(False), marks(True)),
        guides=(IDEAL,),
    )


def natural_shifts(study: Study) -> Chart | Missing:
    """Figure 13: accuracy under natural shifts over accuracy on ImageNet, with the line of ImageNet models."""
    number, title = "13", "Natural shifts over ImageNet"
    command = f"{SHIFTS_COMMAND}; diptych report RESULTS --imagenet-models TABLE.csv"
    models = [model for model in study.having("zeroshot") if study.get(model, IMAGENET, "zeroshot")]
    with_shifts = [model for model in models if _shifts_of(study, model)]
    if not with_shifts:
        why = "no model has zero-shot results on ImageNet and on one of its shifts"
        return Missing(number=number, title=title, why=why, command=command)
    shared = [s for s in SHIFTS if all((m, s, PROTOCOL_OF_SHIFT[s]) in study.results for m in with_shifts)]
    some = [s for s in SHIFTS if any((m, s, PROTOCOL_OF_SHIFT[s]) in study.results for m in with_shifts)]
    panels = [_average_panel(study, with_shifts, shared)] if len(shared) > 1 else []
    panels += [_shift_panel(study, with_shifts, shift) for shift in some]
    whole = [s for s in some if not any((m, s) in study.on_subset for m in with_shifts) and s in ON_A_PART]
    caption = sentence(
        "A perfectly robust model lies on the diagonal; effective robustness is the distance above the line of "
        "ImageNet models."
        if study.table
        else "A perfectly robust model lies on the diagonal. No table of ImageNet models was given, so there is no "
        "fitted line and no effective robustness.",
        f"Missing shifts: {list_few([s for s in SHIFTS if s not in some])}." if len(some) < len(SHIFTS) else "",
        f"ImageNet's accuracy is over all its classes, not those of the shift, for {list_few(whole)}." if whole else "",
    )
    return Chart(
        number=number, name="natural-shifts", title=title, caption=caption, panels=tuple(panels), command=command
    )


def _average_panel(study: Study, models: Sequence[str], shifts: Sequence[str]) -> Plot:
    """Averages over shifts, of ImageNet too: on the classes of each shift where they are known."""

    def marks(baseline: bool) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                x=mean([study.imagenet(m, s) or 0.0 for s in shifts]),
                y=mean([study.results[m, s, PROTOCOL_OF_SHIFT[s]].value for s in shifts]),
                label=m,
            )
            for m in models
            if study.models[m].baseline == baseline
        )

    table = [
        (mean([pair[0] for pair in pairs]), mean([pair[1] for pair in pairs]))
        for row in study.table
        if len(pairs := [pair for s in shifts if (pair := row.pair(s))]) == len(shifts)
    ]
    inside = [pair for pair in table if all(0 < accuracy < 1 for accuracy in pair)]
    line = fit_line(inside) if len({x for x, _ in inside}) > 1 else None
    return Plot(
        title=f"Average of {len(shifts)} shifts",
        x_label="ImageNet (%)",
        y_label="under shift (%)",
        x_axis="logit",
        y_axis="logit",
        series=(*_both(marks(False), marks(True)), *_table_series(table)),
        guides=(IDEAL, *_fitted(line)),
    )


def _shift_panel(study: Study, models: Sequence[str], shift: str) -> Plot:
    def marks(baseline: bool) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                x=study.imagenet(m, shift) or 0.0,
                y=found.value,
                label=m,
                low=found.ci95[0] if found.ci95 else None,
                high=found.ci95[1] if found.ci95 else None,
            )
            for m in models
            if study.models[m].baseline == baseline and (found := study.get(m, shift, PROTOCOL_OF_SHIFT[shift]))
        )

    return Plot(
        title=shift,
        x_label="ImageNet (%)",
        y_label="under shift (%)",
        x_axis="logit",
        y_axis="logit",
        series=(
            *_both(marks(False), marks(True)),
            *_table_series([pair for row in study.table if (pair := row.pair(shift))]),
            *_published_shift(study, models, shift),
        ),
        guides=(IDEAL, *_fitted(fit_shift(study.table, shift))),
    )


def _fitted(line: Line | None) -> tuple[Guide, ...]:
    """The line of the table's models, straight between logits."""
    if line is None:
        return ()
    points = tuple((x / 100, line.expected(x / 100)) for x in range(5, 100, 5))
    return (Guide(name=f"{line.models} ImageNet models, fitted", points=points),)


def _published_shift(study: Study, models: Sequence[str], shift: str) -> tuple[Series, ...]:
    """Published points of the models that are shown, and of the best ImageNet models of Table 16."""
    metric = "pm0" if PROTOCOL_OF_SHIFT[shift] == "temporal" else None
    marks: dict[Whose, list[Mark]] = {"confirmed": [], "unconfirmed": []}
    others = ("EfficientNet-L2-NoisyStudent", "FixResNeXt101-32x48d-v2", "ResNet-101")
    names = [
        (n, "zeroshot", PROTOCOL_OF_SHIFT[shift]) for n in sorted({study.names[m] for m in models if m in study.names})
    ]
    for name, on_imagenet, under in (*names, *((name, "supervised", "supervised") for name in others)):
        x = reference(IMAGENET, name, on_imagenet, profile="paper")
        y = reference(shift, name, under, profile="paper", metric=metric)
        if x and y:
            whose = "confirmed" if x[0].confirmed and y[0].confirmed else "unconfirmed"
            marks[whose].append(Mark(x=x[0].value, y=y[0].value, label=name))
    return tuple(
        Series(name=f"paper, {whose}", marks=tuple(some), whose=whose) for whose, some in marks.items() if some
    )


def _table_series(table: Sequence[tuple[float, float]]) -> tuple[Series, ...]:
    marks = tuple(Mark(x=x, y=y) for x, y in table if 0 < x < 1 and 0 < y < 1)
    return (Series(name="ImageNet models (table)", marks=marks, whose="baseline", labelled=False),) if marks else ()


def _shifts_of(study: Study, model: str) -> list[str]:
    return [s for s in SHIFTS if study.get(model, s, PROTOCOL_OF_SHIFT[s])]


def adaptation(study: Study) -> Chart | Missing:
    """Figure 14: what a probe on ImageNet changes, and what classifiers made of the shift's own classes change."""
    number, title = "14", "Adapting to ImageNet, and to the classes of a shift"
    command = f"{SHIFTS_COMMAND} --protocols zeroshot temporal probe"
    model = study.shown
    probed = [s for s in (IMAGENET, *SHIFTS) if _adapted(study, model, s, "probe") and _natural(study, model, s)]
    bars = [
        _change(study, s, _value(study, model, s, "probe") - (_natural(study, model, s) or 0.0), "probe_minus_zeroshot")
        for s in probed
    ]
    own = [
        _change(study, s, found.value - found.metrics[POOLED], "own_classes_minus_pooled")
        for s in SHIFTS
        if (found := study.get(model, s, PROTOCOL_OF_SHIFT[s])) and POOLED in found.metrics
    ]
    panels = [
        Bars(title=name, x_label="change (points)", axis="points", bars=tuple(some))
        for name, some in ((f"{model}: probe on ImageNet", bars), (f"{model}: classes of the shift", own))
        if some
    ]
    if not any(bar.label != IMAGENET for bar in (*bars, *own)):
        why = f"{model} has no probe of ImageNet that was asked about a shift, nor pooled classes of ImageNet"
        return Missing(number=number, title=title, why=why, command=command)
    caption = sentence(
        "Left: logistic regression on ImageNet against zero-shot. Right: names of the shift's own classes against the "
        "best of ImageNet's that belong to each.",
        "" if own else "The second is missing: no result has accuracies of pooled classes.",
        "" if bars else "The first is missing: no probe of ImageNet was asked about a shift.",
    )
    return Chart(number=number, name="adaptation", title=title, caption=caption, panels=tuple(panels), command=command)


def _change(study: Study, shift: str, change: float, protocol: str) -> Bar:
    found = reference(shift, study.names.get(study.shown, ""), protocol)
    return Bar(
        label=shift,
        value=change,
        published=found[0].value if found else None,
        confirmed=bool(found and found[0].confirmed),
    )


def adaptation_by_shots(study: Study) -> Chart | Missing:
    """Figure 15: how robustness goes while a probe sees more of ImageNet."""
    number, title = "15", "Robustness of few-shot probes on ImageNet"
    command = f"{SHIFTS_COMMAND} --protocols zeroshot temporal probe fewshot"
    model = study.shown
    measured: list[Protocol] = [
        p
        for p in ("fewshot", "probe")
        if any(_adapted(study, model, s, p) for s in SHIFTS) and study.get(model, IMAGENET, p)
    ]
    shifts = [s for s in SHIFTS if _natural(study, model, s) and all(_adapted(study, model, s, p) for p in measured)]
    if not shifts or not measured:
        why = f"{model} has no probes of ImageNet, on few or all pictures, that were asked about the same shift"
        return Missing(number=number, title=title, why=why, command=command)
    path = _path(study, model, shifts, measured)
    panels: list[Plot | Bars] = [
        Plot(
            title=f"{model}: average of {len(shifts)} shifts",
            x_label="ImageNet (%)",
            y_label="under shift (%)",
            x_axis="logit",
            y_axis="logit",
            series=(Series(name=model, marks=tuple(Mark(x=x, y=y, label=k) for k, x, y in path), joined=True),),
            guides=(IDEAL,),
        )
    ]
    lines = [line for s in shifts if (line := fit_shift(study.table, s))]
    if len(lines) == len(shifts):
        robust = [Bar(label=k, value=mean([effective_robustness(line, x, y) for line in lines])) for k, x, y in path]
        panels.append(Bars(title="Effective robustness", x_label="points", axis="points", bars=tuple(robust)))
    caption = sentence(
        f"Shifts: {list_few(shifts)}.",
        "" if "fewshot" in measured else "Few-shot points are missing.",
        "" if len(panels) > 1 else "No table of ImageNet models was given, so there is no effective robustness.",
    )
    return Chart(
        number=number, name="adaptation-shots", title=title, caption=caption, panels=tuple(panels), command=command
    )


def _path(
    study: Study, model: str, shifts: Sequence[str], measured: Sequence[Protocol]
) -> list[tuple[str, float, float]]:
    """From zero-shot over few shots to all pictures: what it is, accuracy on ImageNet, average under the shifts."""
    path = []
    if (zero := study.value(model, IMAGENET, "zeroshot")) is not None:
        path.append(("zero-shot", zero, mean([_natural(study, model, s) or 0.0 for s in shifts])))
    if "fewshot" in measured:
        on_imagenet = study.results[model, IMAGENET, "fewshot"].details["shots"]
        few = [study.results[model, s, "fewshot"].details["shots"] for s in shifts]
        for k in sorted((k for k in on_imagenet if all(k in of_shift for of_shift in few)), key=int):
            path.append((f"{k}-shot", mean(on_imagenet[k]), mean([mean(of_shift[k]) for of_shift in few])))
    if "probe" in measured:
        under = mean([_value(study, model, s, "probe") for s in shifts])
        path.append(("all", _value(study, model, IMAGENET, "probe"), under))
    return path


def _adapted(study: Study, model: str, shift: str, protocol: Protocol) -> bool:
    """Whether a probe of ImageNet was asked about this dataset."""
    found = study.get(model, shift, protocol)
    return found is not None and (shift == IMAGENET or found.details.get("trained_on") == IMAGENET)


def _natural(study: Study, model: str, dataset: str) -> float | None:
    return study.value(model, dataset, PROTOCOL_OF_SHIFT.get(dataset, "zeroshot"))


def _value(study: Study, model: str, dataset: str, protocol: Protocol) -> float:
    return study.results[model, dataset, protocol].value


def overlap(study: Study) -> Chart | Missing:
    """Figure 17: what pictures that were seen in training change, over their share."""
    number, title = "17", "Overlap with the training pictures"
    command = (
        "diptych curate contamination ...; "
        "diptych evaluate --model MODEL --suite DATASET --protocols overlap --overlap overlap.parquet"
    )
    found = [r for (model, _, p), r in sorted(study.results.items()) if p == "overlap" and model == study.shown]
    divided = [r for r in found if r.details["overlapping"] and r.details["overlapping"] < r.images]
    if not divided:
        why = (
            f"none of {study.shown}'s {len(found)} overlap results has both seen and unseen pictures"
            if found
            else f"{study.shown} has no overlap results"
        )
        return Missing(number=number, title=title, why=why, command=command)
    p_values = [float(r.details["p_value"]) for r in divided]
    levels = list(zip(p_values, bonferroni(p_values), strict=True))
    names = {"p < 0.05 after Bonferroni": (0.0, 0.05), "p < 0.05": (0.05, 2.0)}

    def level(p: float, corrected: float) -> str:
        if p >= 0.05:
            return "p >= 0.05"
        return next(name for name, (low, high) in names.items() if low <= corrected < high)

    left, right = {}, {}
    for result, (p, corrected) in zip(divided, levels, strict=True):
        details, name = result.details, level(p, corrected)
        clean, (low, high) = details["acc_clean"], details["interval"]
        gap = Mark(
            x=details["share"],
            y=details["acc_overlap"] - clean,
            low=low - clean,
            high=high - clean,
            label=result.dataset,
        )
        left.setdefault(name, []).append(gap)
        right.setdefault(name, []).append(Mark(x=details["share"], y=details["gained"], label=result.dataset))
    zero = Guide(name="no difference", points=((0.0, 0.0), (max(r.details["share"] for r in divided), 0.0)))
    panels = tuple(
        Plot(
            title=title,
            x_label="pictures that were seen in training (%)",
            y_label=f"{y_label} (points)",
            x_axis="share",
            y_axis="points",
            series=tuple(Series(name=name, marks=tuple(marks)) for name, marks in sorted(some.items())),
            guides=(zero,),
        )
        for title, y_label, some in (
            ("Accuracy on seen minus on unseen pictures", "difference", left),
            ("What they add to the reported accuracy", "all minus unseen", right),
        )
    )
    none = [r.dataset for r in found if not r.details["overlapping"]]
    caption = sentence(
        f"{study.shown}. Intervals: 99.5 %, Clopper-Pearson, of the accuracy on seen pictures.",
        f"Without any seen picture: {list_few(none)}." if none else "",
    )
    return Chart(number=number, name="overlap", title=title, caption=caption, panels=panels, command=command)


def _both(ours: tuple[Mark, ...], baselines: tuple[Mark, ...]) -> tuple[Series, ...]:
    named: tuple[tuple[str, tuple[Mark, ...], Whose], ...] = (
        ("CLIP", ours, "ours"),
        ("baselines", baselines, "baseline"),
    )
    return tuple(Series(name=name, marks=_inside(marks), whose=whose) for name, marks, whose in named if _inside(marks))


def _inside(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """Without those at 0 or 1, which have no place on an axis of logits."""
    return tuple(mark for mark in marks if 0 < mark.x < 1 and 0 < mark.y < 1 and math.isfinite(mark.y))


IDEAL = Guide(name="as good as on ImageNet", points=((0.01, 0.01), (0.99, 0.99)))
ON_A_PART = ("imagenet_r", "imagenet_a", "objectnet", "imagenet_vid_robust", "ytbb_robust")
"""Shifts that cover a part of ImageNet's classes."""
