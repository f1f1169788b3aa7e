"""Figures 4 to 8 and 11: prompts, zero-shot beside probes on all or a few labelled examples, other models' probes."""

import math
import statistics
from collections.abc import Sequence

from diptych.evaluate.references import PAPER27, PAPER_MODELS, reference
from diptych.evaluate.report.captions import evaluate_command, left_out, list_few, mean, sentence
from diptych.evaluate.report.results_table import GFLOPS, Study
from diptych.evaluate.results import Result
from diptych.report.charts import Bar, Bars, Chart, Guide, Mark, Missing, Plot, Series, Whose

NOISY_STUDENT = "EfficientNet-L2-NoisyStudent"
"""Figure 11's other model, the best on ImageNet of its time."""
PAPER_EFFICIENCY = {"median": 5.4, "mean": 20.8}
"""Examples a class, Figure 7; confirmed in public text."""
SEARCH_NOTE = "The forward search picks templates on training pictures where there are any."


def prompting(study: Study) -> Chart | Missing:
    """Figure 4: prompts and their ensembles against bare names."""
    number, title = "4", "Prompts and ensembles against bare names"
    models = study.having("prompts")
    shared = study.shared("prompts", models)
    command = evaluate_command(shared, "prompts", several=len(models) > 1)
    if not models:
        return Missing(number=number, title=title, why="no model has results of the protocol prompts", command=command)
    if not shared:
        return Missing(number=number, title=title, why="no dataset has prompts results of all models", command=command)
    sized = [model for model in models if study.models[model].gflops]
    over_size = len({study.models[model].gflops for model in sized}) > 1
    if not over_size:
        one = study.shown if study.shown in models else models[0]
        panel, said = _prompt_gains(study, one), f"Of {one}; with models of several sizes this is drawn over size."
    else:
        ways = {"bare names": "bare", "a photo of a ...": "simple", "ensemble": "ensemble", "forward search": "search"}
        panel = Plot(
            title=f"Mean of {len(shared)} datasets",
            x_label=GFLOPS,
            y_label="mean score (%)",
            x_axis="log",
            y_axis="percent",
            series=tuple(
                Series(
                    name=name,
                    joined=True,
                    labelled=key == "ensemble",
                    marks=tuple(
                        Mark(
                            x=study.models[model].gflops or 0.0,
                            y=mean([_way(study, model, dataset, key) for dataset in shared]),
                            label=model,
                        )
                        for model in study.by_size(sized)
                    ),
                )
                for name, key in ways.items()
            ),
        )
        said = f"Mean over {list_few(shared)}."
    left = [model for model in models if model not in sized and over_size]
    caption = sentence(said, SEARCH_NOTE, left_out(left, "their operations are not known"))
    return Chart(number=number, name="prompts", title=title, caption=caption, panels=(panel,), command=command)


def _prompt_gains(study: Study, model: str) -> Bars:
    gains = [
        Bar(label=dataset, value=_way(study, model, dataset, "ensemble") - _way(study, model, dataset, "bare"))
        for dataset in study.datasets("prompts", model)
    ]
    return Bars(
        title=f"{model}: ensemble minus bare names",
        x_label="difference (points)",
        axis="points",
        bars=_sorted(gains),
        guides=(Guide(name="mean", at=mean([bar.value for bar in gains])),),
    )


def _way(study: Study, model: str, dataset: str, way: str) -> float:
    """Score of one way to make a classifier; the search's is the headline."""
    found = study.results[model, dataset, "prompts"]
    return found.value if way == "search" else float(found.details[way])


def zero_shot_or_probe(study: Study) -> Chart | Missing:
    """Figure 5: zero-shot minus a probe on a ResNet-50, or on the model's own features if there is none."""
    number, title = "5", "Zero-shot against a linear probe"
    model = study.shown
    command = evaluate_command(study.datasets("zeroshot", model), "zeroshot", "probe")
    other = study.resnet50 or model
    shared = [d for d in study.datasets("zeroshot", model) if study.get(other, d, "probe")]
    shared = [d for d in shared if _same_metric(study, (model, d, "zeroshot"), (other, d, "probe"))]
    if not shared:
        why = f"no dataset has zero-shot results of {model} and a probe of {other} in the same metric"
        return Missing(number=number, title=title, why=why, command=command)
    bars = []
    for dataset in shared:
        zero, probed = study.results[model, dataset, "zeroshot"], study.results[other, dataset, "probe"]
        published = _published_gap(study, dataset, own=other == model)
        bars.append(
            Bar(
                label=dataset,
                value=zero.value - probed.value,
                published=published[0] if published else None,
                confirmed=bool(published and published[1]),
            )
        )
    wins = sum(bar.value > 0 for bar in bars)
    against = "its own features" if other == model else other
    caption = sentence(
        f"Above 0 the zero-shot classifier of {model} is better than logistic regression on {against}, which has seen "
        f"the whole training set: on {wins} of {len(bars)} datasets.",
        "The paper compares with an ImageNet ResNet-50; no such baseline is among the results."
        if other == model
        else "",
        _of_27(shared),
    )
    panel = Bars(
        title=f"{model} minus a probe on {against}",
        x_label="difference (points)",
        axis="points",
        bars=_sorted(bars),
    )
    return Chart(
        number=number, name="zero-shot-or-probe", title=title, caption=caption, panels=(panel,), command=command
    )


def _published_gap(study: Study, dataset: str, *, own: bool) -> tuple[float, bool] | None:
    """The published difference, and whether it is confirmed."""
    if not own:
        found = reference(dataset, study.names.get(study.shown, ""), "zeroshot_minus_resnet50_probe")
        return (found[0].value, found[0].confirmed) if found else None
    zero, probed = study.paper(study.shown, dataset, "zeroshot"), study.paper(study.shown, dataset, "probe")
    return (zero.value - probed.value, zero.confirmed and probed.confirmed) if zero and probed else None


def few_shot(study: Study) -> Chart | Missing:
    """Figure 6: zero-shot against probes on a few examples a class."""
    number, title = "6", "Zero-shot against few-shot probes"
    models = study.having("fewshot")
    measured = study.shared("fewshot", models)
    command = evaluate_command(measured, "zeroshot", "fewshot", several=len(models) > 1)
    if not measured:
        why = "no dataset has few-shot results of all models" if models else "no model has few-shot results"
        return Missing(number=number, title=title, why=why, command=command)
    shots = sorted({int(k) for m in models for d in measured for k in study.results[m, d, "fewshot"].details["shots"]})
    shared = [d for d in measured if all(_has_shots(study, m, d, shots) for m in models)]
    if not shared:
        why = f"no dataset has {max(shots)} examples of each class for all models"
        return Missing(number=number, title=title, why=why, command=command)
    series: list[Series] = []
    for model in models:
        whose: Whose = "baseline" if study.models[model].baseline else "ours"
        curve = tuple(_shot_mark(study, model, shared, k) for k in shots)
        series.append(
            Series(name=f"{model}, probe", marks=curve, joined=True, labelled=False, whose=whose, family=model)
        )
        zero = [value for d in shared if (value := study.value(model, d, "zeroshot")) is not None]
        if len(zero) == len(shared):
            mark = Mark(x=0.0, y=mean(zero), label="zero-shot")
            series.append(Series(name=f"{model}, zero-shot", marks=(mark,), whose=whose, family=model))
    panel = Plot(
        title=f"Mean of {len(shared)} datasets",
        x_label="labelled examples of each class",
        y_label="mean score (%)",
        x_axis="shots",
        y_axis="percent",
        series=tuple(series),
    )
    short = [d for d in measured if d not in shared]
    caption = sentence(
        f"Mean over {list_few(shared)}; bars reach from the lowest to the highest draw of the examples.",
        left_out(short, f"a class has fewer than {max(shots)} examples"),
        "The paper averages the 20 datasets with at least 16 examples of each class.",
    )
    return Chart(number=number, name="few-shot", title=title, caption=caption, panels=(panel,), command=command)


def _has_shots(study: Study, model: str, dataset: str, shots: Sequence[int]) -> bool:
    return {str(k) for k in shots} <= study.results[model, dataset, "fewshot"].details["shots"].keys()


def _shot_mark(study: Study, model: str, datasets: Sequence[str], shots: int) -> Mark:
    """Average over datasets, and over draws; the interval is that of the averages of each draw."""
    values = [study.results[model, d, "fewshot"].details["shots"][str(shots)] for d in datasets]
    draws = min(len(of_dataset) for of_dataset in values)
    by_draw = [mean([of_dataset[i] for of_dataset in values]) for i in range(draws)]
    average = mean([mean(of_dataset) for of_dataset in values])
    return Mark(x=float(shots), y=average, low=min([*by_draw, average]), high=max([*by_draw, average]))


def data_efficiency(study: Study) -> Chart | Missing:
    """Figure 7: how many examples a class a probe needs to be as good as zero-shot."""
    number, title = "7", "Examples of each class that zero-shot is worth"
    model = study.shown
    command = evaluate_command(study.datasets("zeroshot", model), "zeroshot", "fewshot", "probe")
    found = {d: study.results[model, d, "fewshot"].details.get("efficiency") for d in study.datasets("fewshot", model)}
    guessed = [d for d in found if _is_guessed(study.get(model, d, "zeroshot"))]
    known = {d: float(value) for d, value in found.items() if value is not None and d not in guessed}
    if not known:
        why = f"{model} has no dataset with few-shot, full probe and zero-shot results whose curve meets zero-shot"
        return Missing(number=number, title=title, why=why, command=command)
    ours = {"median": statistics.median(known.values()), "mean": mean(list(known.values()))}
    guides = [Guide(name=f"{name} {value:.1f}", at=value) for name, value in ours.items()]
    if study.names.get(model) in PAPER_MODELS:
        guides += [
            Guide(name=f"paper, {name} {value}", at=value, whose="confirmed")
            for name, value in PAPER_EFFICIENCY.items()
        ]
    panel = Bars(
        title=f"{model}: labelled examples of each class",
        x_label="examples of each class",
        axis="log",
        bars=_sorted([Bar(label=dataset, value=value) for dataset, value in known.items()]),
        guides=tuple(guides),
    )
    caption = sentence(
        "So many examples a probe on the same features needs to reach zero-shot, interpolated between logarithms of "
        f"the numbers that were tried: median {ours['median']:.1f}, mean {ours['mean']:.1f}, of {len(known)} datasets.",
        "Below 1 the line through the two smallest numbers was followed." if min(known.values()) < 1 else "",
        left_out([d for d, value in found.items() if value is None], "the curve of the probe does not meet zero-shot"),
        left_out([d for d in guessed if found[d] is not None], "zero-shot is at chance"),
    )
    return Chart(number=number, name="efficiency", title=title, caption=caption, panels=(panel,), command=command)


def _is_guessed(result: Result | None) -> bool:
    """Whether the interval of a result does not exclude guessing."""
    return result is not None and None not in (result.ci95, result.chance) and result.ci95[0] <= result.chance  # type: ignore[index,operator]


def zero_shot_with_probe(study: Study) -> Chart | Missing:
    """Figure 8: zero-shot over the probe on the same features, with their correlation."""
    number, title = "8", "Zero-shot over the probe on the same features"
    model = study.shown
    command = evaluate_command(study.datasets("zeroshot", model), "zeroshot", "probe")
    shared = [d for d in study.datasets("zeroshot", model) if study.get(model, d, "probe")]
    shared = [d for d in shared if _same_metric(study, (model, d, "zeroshot"), (model, d, "probe"))]
    if len(shared) < 2:
        why = f"{model} has {len(shared)} datasets with zero-shot and probe results; two are needed"
        return Missing(number=number, title=title, why=why, command=command)
    marks = tuple(
        Mark(
            x=study.results[model, d, "probe"].value,
            y=study.results[model, d, "zeroshot"].value,
            low=_ends(study, model, d)[0],
            high=_ends(study, model, d)[1],
            label=d,
        )
        for d in shared
    )
    series = [Series(name=model, marks=marks)]
    for whose in ("confirmed", "unconfirmed"):
        pairs = [(d, _published_pair(study, d)) for d in shared]
        some = tuple(Mark(x=p[0], y=p[1], label=d) for d, p in pairs if p and p[2] == (whose == "confirmed"))
        if some:
            series.append(Series(name=f"published, {whose}", marks=some, whose=whose, labelled=False))
    r = pearson([mark.x for mark in marks], [mark.y for mark in marks])
    panel = Plot(
        title=f"{model}: correlation r = {r:.2f}" if math.isfinite(r) else model,
        x_label="linear probe (%)",
        y_label="zero-shot (%)",
        x_axis="percent",
        y_axis="percent",
        series=tuple(series),
        guides=(Guide(name="as good as the probe", points=((0.0, 0.0), (1.0, 1.0))),),
    )
    caption = sentence(f"{len(shared)} datasets, with 95 % intervals of zero-shot.", _of_27(shared))
    return Chart(
        number=number, name="zero-shot-with-probe", title=title, caption=caption, panels=(panel,), command=command
    )


def probe_or_baseline(study: Study) -> Chart | Missing:
    """Figure 11: a probe on CLIP's features minus one on the best baseline's."""
    number, title = "11", "A probe on CLIP's features against the best other model's"
    model = study.shown
    command = evaluate_command(study.datasets("probe", model), "probe", several=True)
    shared = {m: _probed_alike(study, model, m) for m in study.having("probe", baselines=True)}
    shared = {m: datasets for m, datasets in shared.items() if datasets}
    if not shared:
        why = f"no dataset has probes of {model} and of a baseline (--model timm:NAME) in the same metric"
        return Missing(number=number, title=title, why=why, command=command)
    best = max(shared, key=lambda m: (len(shared[m]), mean([study.results[m, d, "probe"].value for d in shared[m]]), m))
    bars = []
    for dataset in shared[best]:
        gap = study.results[model, dataset, "probe"].value - study.results[best, dataset, "probe"].value
        ours, theirs = study.paper(model, dataset, "probe"), reference(dataset, NOISY_STUDENT, "probe", profile="paper")
        both = (ours, theirs[0]) if ours and theirs else ()
        bars.append(
            Bar(
                label=dataset,
                value=gap,
                published=both[0].value - both[1].value if both else None,
                confirmed=bool(both) and all(one.confirmed for one in both),
            )
        )
    others = [m for m in shared if m != best]
    caption = sentence(
        f"Above 0 a probe is better on the features of {model} than on those of {best}: on "
        f"{sum(bar.value > 0 for bar in bars)} of {len(bars)} datasets.",
        f"It has the highest mean among the baselines with as many datasets; also measured: {list_few(others)}."
        if others
        else "",
        f"The published differences are to {NOISY_STUDENT}.",
        _of_27(shared[best]),
    )
    panel = Bars(
        title=f"{model} minus {best}, probes", x_label="difference (points)", axis="points", bars=_sorted(bars)
    )
    return Chart(
        number=number, name="probe-or-baseline", title=title, caption=caption, panels=(panel,), command=command
    )


def _probed_alike(study: Study, model: str, other: str) -> list[str]:
    """Datasets on which both have a probe in the same metric."""
    shared = study.shared("probe", (model, other))
    return [d for d in shared if _same_metric(study, (model, d, "probe"), (other, d, "probe"))]


def _published_pair(study: Study, dataset: str) -> tuple[float, float, bool] | None:
    zero, probed = study.paper(study.shown, dataset, "zeroshot"), study.paper(study.shown, dataset, "probe")
    return (probed.value, zero.value, zero.confirmed and probed.confirmed) if zero and probed else None


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation; NaN if one side does not vary."""
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan


def _same_metric(study: Study, *cases: tuple[str, str, str]) -> bool:
    """Whether results may be subtracted: measured by one metric, on the same split."""
    found = {(r.metric, r.profile, r.split) for r in (study.results[case] for case in cases)}
    return len(found) == 1


def _sorted(bars: Sequence[Bar]) -> tuple[Bar, ...]:
    return tuple(sorted(bars, key=lambda bar: (-bar.value, bar.label)))


def _ends(study: Study, model: str, dataset: str) -> tuple[float | None, float | None]:
    return study.results[model, dataset, "zeroshot"].ci95 or (None, None)


def _of_27(datasets: Sequence[str]) -> str:
    missing = [d for d in PAPER27 if d not in datasets]
    return f"Of the paper's 27 datasets {27 - len(missing)} are here; missing: {list_few(missing)}." if missing else ""
