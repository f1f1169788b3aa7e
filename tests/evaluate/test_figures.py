"""The paper's figures: the numbers that they show, by hand from a folder of made-up results; and their pictures."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

import made_up_results as made
from diptych.errors import NotFoundError, UsageError
from diptych.evaluate.metrics.robustness import effective_robustness, fit_shift, read_table
from diptych.evaluate.references import KORNBLITH12, PAPER27, SHIFTS, reference
from diptych.evaluate.report.captions import evaluate_command
from diptych.evaluate.report.figures.build import FIGURES, build_charts
from diptych.evaluate.report.figures.transfer import PAPER_EFFICIENCY
from diptych.evaluate.report.results_table import Study, load_study
from diptych.evaluate.results import save_model
from diptych.report.charts import Bars, Chart, Missing, Plot

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "models.csv"
    rows = [f"net{i},{50 + 5 * i},{','.join(str(30 + 4 * i + j) for j in range(7))}" for i in range(7)]
    path.write_text("\n".join([f"model,imagenet,{','.join(SHIFTS)}", *rows]))
    return read_table(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def study(folder, table):
    return load_study(folder, table=table)


def chart(study: Study, number: str) -> Chart:
    built = FIGURES[number](study)
    assert isinstance(built, Chart), built
    return built


def plot(study: Study, number: str, panel: int = 0) -> Plot:
    found = chart(study, number).panels[panel]
    assert isinstance(found, Plot)
    return found


def bars(study: Study, number: str, panel: int = 0) -> Bars:
    found = chart(study, number).panels[panel]
    assert isinstance(found, Bars)
    return found


def series(panel: Plot, name: str):
    return next(one for one in panel.series if one.name == name)


def values(study, protocol, datasets, model="l336"):
    return [study.results[model, dataset, protocol].value for dataset in datasets]


def test_the_model_with_most_results_is_shown_and_baselines_never(study, folder):
    assert study.shown == "l336"
    assert load_study(folder, shown="mine").shown == "mine"
    with pytest.raises(NotFoundError, match="no model 'other'"):
        load_study(folder, shown="other")


def test_all_figures_are_drawn_when_all_is_there(study):
    charts, missing = build_charts(study)
    assert [one.number for one in charts] == list(FIGURES)
    assert missing == []


def test_figure_4_has_a_mean_for_each_way_and_model_over_size(study):
    panel = plot(study, "4")
    for name, way in (("bare names", "bare"), ("ensemble", "ensemble")):
        mean = np.mean([study.results["mine", d, "prompts"].details[way] for d in PAPER27])
        marks = series(panel, name).marks
        assert [mark.label for mark in marks] == ["mine", "b32", "l336"]
        assert [mark.x for mark in marks] == [1.2, 8.3, 370.0]
        assert marks[0].y == pytest.approx(mean)


def test_figure_4_of_one_model_is_a_bar_a_dataset(study):
    alone = replace(study, models={"mine": study.models["mine"]}, shown="mine")
    panel = bars(alone, "4")
    assert [bar.value for bar in panel.bars] == sorted((bar.value for bar in panel.bars), reverse=True)
    details = study.results["mine", "dtd", "prompts"].details
    [dtd] = [bar for bar in panel.bars if bar.label == "dtd"]
    assert dtd.value == pytest.approx(details["ensemble"] - details["bare"])


def test_models_of_one_size_are_not_drawn_over_size(study):
    same = {name: replace(facts, gflops=8.0) for name, facts in study.models.items()}
    changed = replace(study, models=same)
    assert isinstance(chart(changed, "4").panels[0], Bars)
    assert isinstance(FIGURES["9"](changed), Missing)


def test_commands_name_the_suite_or_the_datasets():
    assert evaluate_command(("dtd", "sun397"), "probe") == (
        "diptych evaluate --model MODEL --suite paper27 --protocols probe"
    )
    assert evaluate_command(("digits",), several=True) == "diptych evaluate --model A --model B ... --suite made"
    assert evaluate_command(("digits", "mine")) == "diptych evaluate --model MODEL --suite digits path/to/mine"


def test_figure_5_subtracts_the_resnet_s_probe_and_shows_the_paper_s_delta(study):
    panel = bars(study, "5")
    assert len(panel.bars) == 27
    [cars] = [bar for bar in panel.bars if bar.label == "stanford_cars"]
    zero, probe = (
        study.results["l336", "stanford_cars", "zeroshot"],
        study.results["resnet50", "stanford_cars", "probe"],
    )
    assert cars.value == pytest.approx(zero.value - probe.value)
    assert (cars.published, cars.confirmed) == (pytest.approx(0.289), True)
    assert [bar.confirmed for bar in panel.bars].count(True) == 12


def test_figure_5_knows_a_resnet_by_its_source_under_any_name(study):
    models = {
        **study.models,
        "resnet50": replace(study.models["resnet50"], name="other", source="timm:resnet50.a1_in1k"),
    }
    assert "resnet50" in bars(replace(study, models=models), "5").title
    models["resnet50"] = replace(models["resnet50"], source="timm:convnext_base")
    assert "its own features" in bars(replace(study, models=models), "5").title


def test_figure_5_without_a_resnet_takes_the_model_s_own_probe_and_says_so(study):
    without = replace(study, models={name: f for name, f in study.models.items() if name != "resnet50"})
    built = chart(without, "5")
    assert "no such baseline" in built.caption
    [dtd] = [bar for bar in bars(without, "5").bars if bar.label == "dtd"]
    assert dtd.value == pytest.approx(np.diff(values(study, "probe", ["dtd"]) + values(study, "zeroshot", ["dtd"]))[0])
    assert dtd.published == pytest.approx(0.557 - 0.830)


def test_figure_5_never_subtracts_another_metric(study):
    other = replace(study.results["resnet50", "dtd", "probe"], metric="mean_per_class_recall")
    changed = replace(study, results={**study.results, ("resnet50", "dtd", "probe"): other})
    assert "dtd" not in [bar.label for bar in bars(changed, "5").bars]
    assert "missing: dtd" in chart(changed, "5").caption


def test_figure_6_averages_datasets_that_have_all_shots_and_names_the_others(study):
    panel = plot(study, "6")
    shared = [d for d in PAPER27 if d != "birdsnap"]
    curve = series(panel, "l336, probe").marks
    assert [mark.x for mark in curve] == [1, 2, 4, 8, 16]
    draws = np.array([study.results["l336", d, "fewshot"].details["shots"]["4"] for d in shared])
    assert curve[2].y == pytest.approx(draws.mean())
    assert (curve[2].low, curve[2].high) == (
        pytest.approx(draws.mean(axis=0).min()),
        pytest.approx(draws.mean(axis=0).max()),
    )
    [zero] = series(panel, "l336, zero-shot").marks
    assert (zero.x, zero.y) == (0, pytest.approx(np.mean(values(study, "zeroshot", shared))))
    assert "Left out: birdsnap" in chart(study, "6").caption


def test_figure_7_has_median_mean_and_the_paper_s(study):
    panel = bars(study, "7")
    efficient = [study.results["l336", d, "fewshot"].details["efficiency"] for d in PAPER27 if d != "mnist"]
    assert [bar.value for bar in panel.bars] == sorted(efficient, reverse=True)
    at = [guide.at for guide in panel.guides]
    assert at == [pytest.approx(np.median(efficient)), pytest.approx(np.mean(efficient)), *PAPER_EFFICIENCY.values()]
    assert "mnist" in chart(study, "7").caption
    of_mine = replace(study, shown="mine")
    assert len(bars(of_mine, "7").guides) == 2, "the paper's numbers stand only beside the paper's models"


def test_figure_8_has_the_correlation_and_the_published_pairs(study):
    panel = plot(study, "8")
    order = sorted(PAPER27)
    x, y = values(study, "probe", order), values(study, "zeroshot", order)
    assert [(mark.x, mark.y) for mark in series(panel, "l336").marks] == list(zip(x, y, strict=True))
    assert panel.title == f"l336: correlation r = {np.corrcoef(x, y)[0, 1]:.2f}"
    confirmed = {mark.label for mark in series(panel, "published, confirmed").marks}
    assert confirmed == {"food101", "cifar10", "cifar100", "imagenet"}
    assert len(series(panel, "published, unconfirmed").marks) == 23


def test_another_profile_gets_no_published_number(study):
    other = {case: replace(result, profile="clip_benchmark") for case, result in study.results.items()}
    panel = plot(replace(study, results=other), "8")
    assert [one.name for one in panel.series] == ["l336"]
    assert [one.name for one in plot(replace(study, results=other), "10").series] == ["CLIP", "baselines"]


def test_figure_9_fits_a_power_of_the_size(study):
    panel = plot(study, "9")
    marks = series(panel, "measured").marks
    assert marks[0].y == pytest.approx(1 - np.mean(values(study, "zeroshot", PAPER27, "mine")))
    slope, intercept = np.polyfit(np.log([m.x for m in marks]), np.log([m.y for m in marks]), 1)
    [guide] = panel.guides
    assert guide.name == f"power {slope:.2f}"
    assert guide.points[0] == (pytest.approx(1.2), pytest.approx(math.exp(intercept + slope * math.log(1.2))))


def test_figure_10_has_both_suites_baselines_and_published_averages(study):
    for panel, suite in ((plot(study, "10"), KORNBLITH12), (plot(study, "10", 1), PAPER27)):
        clip = {mark.label: mark.y for mark in series(panel, "CLIP").marks}
        assert clip["l336"] == pytest.approx(np.mean(values(study, "probe", suite)))
        baselines = {mark.label: mark.y for mark in series(panel, "baselines").marks}
        assert baselines["bit"] == pytest.approx(np.mean(values(study, "probe", suite, "bit")))
        published = {mark.label: mark.y for mark in series(panel, "paper, unconfirmed").marks}
        assert len(published) == 9
        expected = np.mean([reference(d, "RN50/openai", "probe", profile="paper")[0].value for d in suite])
        assert published["RN50"] == pytest.approx(expected)


def test_figure_10_of_other_datasets_says_that_they_are_none_of_the_paper_s(study):
    own = {(m, f"own-{d}", p): replace(r, dataset=f"own-{d}") for (m, d, p), r in study.results.items() if p == "probe"}
    built = chart(replace(study, results=own), "10")
    assert "None is of the paper's suites" in built.caption
    assert len(built.panels) == 1


def test_figure_12_is_other_tasks_over_imagenet(study):
    panel = plot(study, "12", 1)
    clip = {mark.label: mark for mark in series(panel, "CLIP").marks}
    assert clip["b32"].x == values(study, "probe", ["imagenet"], "b32")[0]
    others = [d for d in PAPER27 if d != "imagenet"]
    assert clip["b32"].y == pytest.approx(np.mean(values(study, "probe", others, "b32")))


def test_figure_13_has_a_panel_a_shift_with_the_fitted_line(study, table):
    built = chart(study, "13")
    assert [panel.title for panel in built.panels] == ["Average of 7 shifts", *SHIFTS]
    panel = plot(study, "13", 1)
    clip = {mark.label: mark for mark in series(panel, "CLIP").marks}
    assert (clip["l336"].x, clip["l336"].y) == (
        values(study, "zeroshot", ["imagenet"])[0],
        values(study, "zeroshot", ["imagenet_v2"])[0],
    )
    line = fit_shift(table, "imagenet_v2")
    assert line
    assert dict(panel.guides[1].points)[0.5] == pytest.approx(line.expected(0.5))
    published = {mark.label: mark.y for mark in series(panel, "paper, confirmed").marks}
    assert published["EfficientNet-L2-NoisyStudent"] == pytest.approx(0.802)
    average = {mark.label: mark.y for mark in series(plot(study, "13"), "CLIP").marks}
    under = [study.results["l336", s, "temporal" if "robust" in s else "zeroshot"].value for s in SHIFTS]
    assert average["l336"] == pytest.approx(np.mean(under))


def test_figure_13_without_a_table_has_no_fitted_line_and_says_so(folder):
    without = load_study(folder)
    assert all(len(panel.guides) == 1 for panel in chart(without, "13").panels)
    assert "No table of ImageNet models" in chart(without, "13").caption


def test_imagenet_is_measured_on_the_classes_of_a_shift(folder, table):
    made.save_scores(folder, "l336")
    try:
        easy, hard = list(range(10)), list(range(10, 20))
        found = load_study(folder, table=table, subsets={"imagenet_a": easy, "imagenet_r": hard})
        assert found.imagenet("l336", "imagenet_a") == 1.0
        assert 0.0 < (found.imagenet("l336", "imagenet_r") or 1.0) < 0.3
        assert found.imagenet("b32", "imagenet_a") == found.value("b32", "imagenet", "zeroshot")
        assert "imagenet_a" not in chart(found, "13").caption
        (folder / "l336" / "imagenet" / "zeroshot.npz").write_bytes(b"broken")
        with pytest.raises(UsageError, match="evaluate again"):
            load_study(folder, subsets={"imagenet_a": easy})
    finally:
        (folder / "l336" / "imagenet" / "zeroshot.npz").unlink()


def test_figure_14_is_what_a_probe_and_own_classes_change(study):
    probed, own = bars(study, "14"), bars(study, "14", 1)
    by_shift = {bar.label: bar for bar in probed.bars}
    assert by_shift["objectnet"].value == pytest.approx(-0.03)
    assert (by_shift["imagenet"].published, by_shift["imagenet"].confirmed) == (pytest.approx(0.092), True)
    assert by_shift["imagenet_a"].confirmed is False
    assert {bar.label: bar.value for bar in own.bars} == pytest.approx(
        dict.fromkeys(("imagenet_v2", "imagenet_sketch", "imagenet_r", "imagenet_a", "objectnet"), 0.02)
    )


def test_figure_14_does_not_take_a_shift_s_own_probe_for_adaptation(study):
    own = {
        case: replace(result, details={**result.details, "trained_on": "itself"})
        for case, result in study.results.items()
        if case[2] in ("probe", "zeroshot", "temporal")
    }
    built = FIGURES["14"](replace(study, results=own))
    assert isinstance(built, Chart)
    assert [bar.label for bar in built.panels[0].bars] == ["imagenet"]


def test_figure_15_goes_from_zero_shot_to_all_examples(study, table):
    path = plot(study, "15").series[0].marks
    assert [mark.label for mark in path] == ["zero-shot", "1-shot", "4-shot", "16-shot", "all"]
    assert path[-1].x == values(study, "probe", ["imagenet"])[0]
    assert path[0].y == pytest.approx(path[-1].y + 0.03)
    robust = {bar.label: bar.value for bar in bars(study, "15", 1).bars}
    lines = [fit_shift(table, shift) for shift in SHIFTS]
    expected = np.mean([effective_robustness(line, path[0].x, path[0].y) for line in lines if line])
    assert robust["zero-shot"] == pytest.approx(expected)


def test_figure_15_without_few_shots_has_its_ends(study):
    ends = {case: result for case, result in study.results.items() if case[2] != "fewshot"}
    changed = replace(study, results=ends)
    assert [mark.label for mark in plot(changed, "15").series[0].marks] == ["zero-shot", "all"]
    assert "Few-shot points are missing" in chart(changed, "15").caption


def test_figure_17_has_intervals_and_corrected_levels(study):
    left, right = plot(study, "17"), plot(study, "17", 1)
    points = {mark.label: (one.name, mark) for one in left.series for mark in one.marks}
    assert set(points) == {"birdsnap", "country211", "food101"}
    details = study.results["l336", "birdsnap", "overlap"].details
    level, birds = points["birdsnap"]
    assert (level, birds.x) == ("p < 0.05 after Bonferroni", 0.12)
    assert birds.y == pytest.approx(details["acc_overlap"] - details["acc_clean"])
    assert (birds.low, birds.high) == tuple(pytest.approx(end - details["acc_clean"]) for end in details["interval"])
    assert points["country211"][0] == "p >= 0.05"
    gained = {mark.label: mark.y for one in right.series for mark in one.marks}
    assert gained["birdsnap"] == pytest.approx(details["gained"])
    assert "Without any seen picture: mnist" in chart(study, "17").caption


def test_figures_without_data_say_why_and_which_command_helps(tmp_path):
    save_model(tmp_path, made.facts("mine", "runs/mine", 1.0))
    with pytest.raises(UsageError, match="holds no results"):
        load_study(tmp_path)
    made.save(tmp_path, "mine", "digits", "zeroshot", 0.5)
    charts, missing = build_charts(load_study(tmp_path))
    assert charts == []
    assert [one.number for one in missing] == list(FIGURES)
    assert all(one.why and "diptych evaluate" in one.command for one in missing)


def test_results_without_their_model_are_refused(tmp_path):
    made.save(tmp_path, "lost", "digits", "zeroshot", 0.5)
    with pytest.raises(UsageError, match=r"lost has results but no model\.json"):
        load_study(tmp_path)


def test_a_published_name_can_be_given_and_is_checked(folder):
    assert load_study(folder, names={"mine": "RN50/openai"}).names["mine"] == "RN50/openai"
    with pytest.raises(UsageError, match="unknown published model"):
        load_study(folder, names={"mine": "RN50"})
    with pytest.raises(NotFoundError, match="no model 'yours'"):
        load_study(folder, names={"yours": "RN50/openai"})


def test_pictures_are_drawn_the_same_every_time(study, tmp_path):
    from diptych.report.draw import draw_svg, save_charts

    some = [chart(study, "8"), chart(study, "14")]
    paths = save_charts(some, tmp_path)
    assert [path.name for path in paths] == [
        "figure-8-zero-shot-with-probe.png",
        "figure-8-zero-shot-with-probe.svg",
        "figure-14-adaptation.png",
        "figure-14-adaptation.svg",
    ]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert draw_svg(some[0]) == paths[1].read_bytes()


def test_a_picture_shows_every_mark_its_name_and_hollow_published_ones(study):
    from diptych.report.draw import draw_svg

    svg = draw_svg(chart(study, "8")).decode()
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {*PAPER27, "published, confirmed", "l336", "zero-shot (%)"} <= set(texts)
    hollow = re.findall(r'<use xlink:href="#[^"]+" x="[^"]+" y="[^"]+" style="fill-opacity: 0', svg)
    assert len(hollow) == 27 + 2, "27 published pairs, and two in the legend"


@pytest.mark.parametrize(
    "ends", [(0.9, 1.2), (2.1, 2.9), (1.0, 4.96), (0.004, 7.0), (3.0, 370.0), (1e-3, 1e3), (31.0, 33.0)]
)
def test_an_axis_of_logarithms_has_numbers_to_read_it_by(ends):
    from diptych.report.draw import _log_ticks

    ticks = _log_ticks(*ends)
    assert 2 <= len(ticks) <= 9
    assert all(ends[0] <= tick <= ends[1] for tick in ticks)
    assert ticks == sorted(ticks)


def test_one_dataset_s_figure_7_has_numbers_on_its_axis_and_zero_shot_a_mark_of_its_own_in_figure_6(tmp_path):
    from diptych.report.draw import draw_svg

    made.save_model(tmp_path, made.facts("mine", "runs/mine", 0.009))
    shots = {"1": [0.3], "4": [0.4], "16": [0.5]}
    made.save(tmp_path, "mine", "digits", "zeroshot", 0.4)
    made.save(tmp_path, "mine", "digits", "probe", 0.6, details={"train_images": 100})
    made.save(tmp_path, "mine", "digits", "fewshot", 0.5, details={"shots": shots, "efficiency": 3.1})
    study = load_study(tmp_path)
    assert {"1", "2", "3", "4"} <= set(re.findall(r"<text[^>]*>([^<]+)</text>", draw_svg(chart(study, "7")).decode()))
    numbers = re.findall(r"<text[^>]*>(0\.\d+)</text>", draw_svg(chart(study, "10")).decode())
    assert len(set(numbers)) > 1
    marks = re.findall(r'<use xlink:href="#(m[^"]+)"[^>]*style="fill: #2457a6', draw_svg(chart(study, "6")).decode())
    assert len(set(marks)) == 2, "a probe's dot, and zero-shot's star"


def test_marks_at_the_ends_of_a_logit_axis_are_left_out(study):
    perfect = replace(study.results["b32", "imagenet_v2", "zeroshot"], value=1.0)
    changed = replace(study, results={**study.results, ("b32", "imagenet_v2", "zeroshot"): perfect})
    assert "b32" not in {mark.label for mark in series(plot(changed, "13", 1), "CLIP").marks}


def test_missing_is_not_an_error(study):
    nothing = replace(study, results={})
    assert all(isinstance(figure(nothing), Missing) for figure in FIGURES.values())


def test_figure_11_subtracts_the_best_baseline_s_probe(study):
    panel = bars(study, "11")
    means = {m: np.mean(values(study, "probe", PAPER27, m)) for m in ("resnet50", "bit")}
    best = max(means, key=lambda m: means[m])
    assert panel.title == f"l336 minus {best}, probes"
    [cars] = [bar for bar in panel.bars if bar.label == "stanford_cars"]
    assert cars.value == pytest.approx(
        study.results["l336", "stanford_cars", "probe"].value - study.results[best, "stanford_cars", "probe"].value
    )
    paper = [reference("stanford_cars", m, "probe")[0] for m in ("ViT-L-14-336/openai", "EfficientNet-L2-NoisyStudent")]
    assert cars.published == pytest.approx(paper[0].value - paper[1].value)
    assert cars.confirmed == all(one.confirmed for one in paper)
    [mnist] = [bar for bar in panel.bars if bar.label == "mnist"]
    assert mnist.published is None or reference("mnist", "EfficientNet-L2-NoisyStudent", "probe")
    alone = replace(study, models={name: facts for name, facts in study.models.items() if not facts.baseline})
    missing = FIGURES["11"](alone)
    assert isinstance(missing, Missing)
    assert "timm:NAME" in missing.why


@pytest.mark.parametrize(("number", "protocol"), [("20", "probe"), ("22", "zeroshot")])
def test_figures_20_and_22_have_a_panel_for_each_dataset(study, number, protocol):
    panels = chart(study, number).panels
    assert [panel.title for panel in panels] == list(PAPER27)
    cars = panels[PAPER27.index("stanford_cars")]
    marks = series(cars, "CLIP").marks
    assert [mark.label for mark in marks] == ["mine", "b32", "l336"]
    assert [mark.y for mark in marks] == [
        study.results[m, "stanford_cars", protocol].value for m in ("mine", "b32", "l336")
    ]
    names = [one.name for one in cars.series]
    assert ("baselines" in names) == (protocol == "probe")
    assert any(name.startswith("paper") for name in names)
    line = [study.results["resnet50", "stanford_cars", "probe"].value] * 2
    assert [y for guide in cars.guides for _, y in guide.points] == (line if protocol == "zeroshot" else [])


def test_a_dataset_of_one_size_has_no_panel_over_size(study):
    results = {key: r for key, r in study.results.items() if key[0] == "l336" or key[1] == "dtd"}
    built = FIGURES["22"](replace(study, results=results))
    assert isinstance(built, Chart)
    assert [panel.title for panel in built.panels] == ["dtd"]
    assert "models of two sizes are needed" in built.caption


def test_figure_7_leaves_out_what_was_guessed(study):
    key = ("l336", "dtd", "zeroshot")
    guessed = replace(study.results[key], value=0.1, ci95=(0.05, 0.15), chance=0.1)
    results = {**study.results, key: guessed}
    assert "dtd" in [bar.label for bar in bars(study, "7").bars]
    changed = replace(study, results=results)
    assert "dtd" not in [bar.label for bar in bars(changed, "7").bars]
    assert "Left out: dtd (zero-shot is at chance)." in chart(changed, "7").caption
