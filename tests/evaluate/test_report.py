"""The report: every number beside what is published, whole in one file; and its command."""

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import made_up_results as made
from diptych.cli import main
from diptych.errors import UsageError
from diptych.evaluate.metrics.robustness import TableRow
from diptych.evaluate.references import PAPER27
from diptych.evaluate.report.figures.build import FIGURES, build_charts
from diptych.evaluate.report.html import describe, write_report
from diptych.evaluate.report.results_table import load_study
from diptych.evaluate.results import PROTOCOLS

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = made.write(tmp_path_factory.mktemp("results"))
    table = [
        TableRow(model=f"net{i}", accuracies={"imagenet": 0.5 + i / 10, "imagenet_v2": 0.4 + i / 10}) for i in (0, 3)
    ]
    return load_study(folder, table=table)


@pytest.fixture(scope="module")
def shown(study):
    charts, missing = build_charts(study)
    return describe(study, charts[:1], missing, lambda chart: chart.name.encode())


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    written = write_report(study, out, title="Results <made up>", command="diptych report results")
    assert written.html == out
    return out.read_text("utf-8")


def row(shown, protocol, dataset, model="l336"):
    section = next(section for section in shown["sections"] if section["protocol"] == protocol)
    return next(row for row in section["rows"] if (row["dataset"], row["model"]) == (dataset, model))


def test_every_result_has_its_row(study, shown):
    assert [section["protocol"] for section in shown["sections"]] == list(PROTOCOLS)
    assert sum(len(section["rows"]) for section in shown["sections"]) == len(study.results)


def test_a_row_has_the_number_its_interval_chance_and_the_published_one(study, shown):
    cars = row(shown, "zeroshot", "stanford_cars")
    value = study.results["l336", "stanford_cars", "zeroshot"].value
    assert cars["value"] == f"{100 * value:.2f}"
    assert cars["chance"] == "1.00"
    assert cars["interval"].startswith(f"{100 * study.results['l336', 'stanford_cars', 'zeroshot'].ci95[0]:.2f} to ")
    assert (cars["published"], cars["confirmed"]) == ("78.80", False)
    assert cars["delta"] == f"{100 * (value - 0.788):+.2f}"
    assert cars["skipped"] == "truncated 2"
    food = row(shown, "zeroshot", "food101")
    assert (food["published"], food["confirmed"], food["source"]) == ("93.80", True, "Radford et al. 2021, Table 11")


def test_differences_within_a_point_are_near(study):
    case = ("l336", "food101", "zeroshot")
    for value, tone in ((0.939, "near"), (0.9285, "near"), (0.92, "far"), (0.95, "far")):
        changed = replace(study, results={case: replace(study.results[case], value=value, metrics={})})
        [section] = describe(changed, [], [], lambda chart: b"")["sections"]
        assert section["rows"][0]["tone"] == tone, value


def test_another_profile_s_number_is_in_brackets(study):
    case = ("b32", "imagenet", "zeroshot")
    laion = replace(study, names={"b32": "ViT-B-32/laion2b_s34b_b79k"}, results={case: study.results[case]})
    [section] = describe(laion, [], [], lambda chart: b"")["sections"]
    [only] = section["rows"]
    assert (only["published"], only["tone"]) == ("66.60", "other")
    assert re.fullmatch(r"\([+-]\d+\.\d\d\)", only["delta"])
    assert "clip_benchmark's prompts and splits" in only["source"]


def test_models_without_a_published_name_are_not_compared(shown):
    mine = row(shown, "zeroshot", "food101", "mine")
    assert (mine["published"], mine["delta"], mine["caveats"]) == ("", "", [])


def test_rows_that_nobody_reproduces_say_so(shown):
    assert "below Table 11 for everyone" in row(shown, "zeroshot", "mnist")["caveats"][0]
    assert {c.dataset for c in shown["caveats"] if c.kind == "nobody"} >= {"mnist", "cifar100", "fgvc_aircraft"}


def test_averages_are_over_the_suite_with_the_published_one_over_the_same(study, shown):
    [average] = [
        a for a in shown["averages"] if (a["model"], a["protocol"], a["suite"]) == ("l336", "zeroshot", "paper27")
    ]
    value = sum(study.results["l336", d, "zeroshot"].value for d in PAPER27) / 27
    assert (average["there"], average["all"], average["value"]) == (27, 27, f"{100 * value:.2f}")
    assert float(average["published"]) == pytest.approx(67.6, abs=0.05)
    assert average["confirmed"] is False


def test_best_and_worst_classes_are_listed(shown):
    [food] = [c for c in shown["classes"] if (c["dataset"], c["model"]) == ("food101", "l336")]
    assert [one["value"] for one in food["best"]] == ["100.00", "90.00", "80.00", "80.00", "70.00"]
    assert [one["name"] for one in food["worst"]][-1] == "class <11>"
    assert food["best"][0]["interval"].endswith("100.00")


def test_tables_of_single_protocols_are_there(shown):
    titles = [table.title for table in shown["tables"]]
    assert titles[:5] == [
        "Calibration of zero-shot",
        "Retrieval",
        "Linear probes",
        "Overlap with the training pictures",
        "Robustness to natural shifts",
    ]
    assert titles[5:] == [
        "Probe of bias: non human, l336 on fairface",
        "Probe of bias: crime, l336 on fairface",
        "Published of others",
    ]
    assert all("not a reproduction" in table.note for table in shown["tables"][5:-1])
    assert all(len(line) == len(table.heads) for table in shown["tables"] for line in table.rows)
    robust = {(line[0], line[1]): line for line in shown["tables"][4].rows}
    assert robust["imagenet_v2", "l336"][4] != ""
    assert robust["imagenet_a", "l336"][4] == "", "the table has no line for it"
    assert robust["imagenet_v2", "l336"][5] == "-3.00"


def test_published_recalls_stand_below_ours(study, shown):
    lines = list(shown["tables"][1].rows)
    place = next(i for i, line in enumerate(lines) if line[:2] == ("flickr30k", "l336"))
    assert (
        lines[place][2]
        == f"{100 * study.results['l336', 'flickr30k', 'retrieval'].metrics['text_retrieval_recall@1']:.2f}"
    )
    paper, openclip = lines[place + 1 : place + 3]
    assert paper[1:4] == ("ViT-L-14-336/openai, published by the paper", "88.00", "98.70")
    assert openclip[1:3] == ("ViT-L-14-336/openai, published by OpenCLIP", "87.70")
    of_mine = next(i for i, line in enumerate(lines) if line[:2] == ("flickr30k", "mine"))
    assert lines[of_mine + 1][0] == "mscoco", "nothing is published of it"


def test_the_overlap_s_p_values_are_corrected_over_a_model_s_sets(study, shown):
    lines = {line[0]: line for line in shown["tables"][3].rows}
    p = study.results["l336", "food101", "overlap"].details["p_value"]
    assert lines["food101"][-2:] == (f"{p:.3g}", f"{min(1, 4 * p):.3g}")
    assert lines["mnist"][6] == "", "nothing was seen, so there is no accuracy of it"


def test_the_page_is_whole_and_asks_for_nothing(page):
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action"))
            assert tag not in ("script", "link", "iframe")

    Links().feed(page)
    assert len(found) == len(FIGURES)
    for link in found:
        head, _, data = link.partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert "<svg" in svg
        assert "@import" not in svg
    assert "@import" not in page


def test_names_from_data_cannot_become_markup(page):
    assert "class &lt;0&gt;" in page
    assert "<b>10 %" not in page
    assert "<title>Results &lt;made up&gt;</title>" in page


def test_the_page_names_no_place_of_the_machine(study):
    facts = replace(study.models["mine"], source="/home/someone/runs/secret/mine")
    about = {"torch": "2.13.0", "data": "/home/someone/data", "date": "2026-11-26", "settings": {"data": "/home"}}
    case = ("mine", "food101", "zeroshot")
    changed = replace(
        study,
        models={**study.models, "mine": facts},
        results={**study.results, case: replace(study.results[case], about=about)},
    )
    shown = describe(changed, [], [], lambda chart: b"")
    assert "/home" not in str(shown)
    assert [model["source"] for model in shown["models"] if model["name"] == "mine"] == ["mine"]
    assert dict(shown["environment"]) == {"torch": "2.13.0", "date": "2026-11-25 to 2026-11-26"}


def test_unconfirmed_numbers_are_marked(page):
    assert re.search(r'<td class="unconfirmed">78\.80\?', page)
    assert re.search(r"<td>93\.80<", page)


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(study, page, tmp_path):
    write_report(study, tmp_path / "r.html", title="Results <made up>", command="diptych report results")
    assert (tmp_path / "r.html").read_text("utf-8") == page


def test_the_command_writes_report_and_figures_and_names_what_is_missing(tmp_path, capsys):
    folder = tmp_path / "results"
    made.save_model(folder, made.facts("mine", "runs/mine", 1.0))
    for dataset, value in (("digits", 0.4), ("counting", 0.2)):
        for protocol in ("zeroshot", "probe"):
            details = {"train_images": 100} if protocol == "probe" else {}
            made.save(folder, "mine", dataset, protocol, value, details=details)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder), "--figures", str(tmp_path / "figures"), "--json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"] == 4
    assert printed["drawn"] == ["5", "8", "10"]
    assert {one["number"] for one in printed["missing"]} == set(FIGURES) - {"5", "8", "10"}
    assert Path(printed["out"]) == folder / "report.html"
    assert "Figures that are not drawn" in (folder / "report.html").read_text("utf-8")
    assert sorted(path.suffix for path in (tmp_path / "figures").iterdir()) == [".png"] * 3 + [".svg"] * 3


def report_of_own(folder, capsys, classes):
    made.save_model(folder, made.facts("mine", "runs/mine", 1.0))
    names = [f"bird <{i}>" for i in range(classes)]
    table = [[6 if i == j else 3 if j == i + 1 else 0 for j in range(classes)] for i in range(classes)]
    per_class = [{"name": name, "images": 9, "recall": 2 / 3} for name in names]
    made.save(folder, "mine", "birds", "zeroshot", 0.6, per_class=per_class, details={"confusion": table})
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    return capsys.readouterr().out, (folder / "report.html").read_text("utf-8")


def test_data_of_ones_own_have_a_confusion_matrix_and_no_list_of_the_paper_s_figures(tmp_path, capsys):
    printed, page = report_of_own(tmp_path, capsys, 4)
    assert len(printed.splitlines()) == 3
    assert "not drawn, for none of the paper's datasets was measured: 4, 5, 6, 7" in printed
    assert "<summary>15 figures of the paper, whose datasets were not measured</summary>" in page
    matrix = page.split("What is taken for what")[1].split("</table>")[0]
    assert re.findall(r"rgba\(36, 87, 166, ([\d.]+)\)[^>]*>(\d*)", matrix)[:5] == [
        ("0.67", "6"),
        ("0.33", "3"),
        ("0.00", ""),
        ("0.00", ""),
        ("0.00", ""),
    ]
    assert "bird &lt;3&gt;" in matrix


def test_many_classes_of_ones_own_have_the_pairs_that_are_confused_most(tmp_path, capsys):
    _, page = report_of_own(tmp_path, capsys, 40)
    matrix = page.split("What is taken for what")[1].split("</table>")[0]
    assert matrix.count("<tr>") == 11
    assert '<td>bird &lt;0&gt;<td class="text">bird &lt;1&gt;<td>3 of 9' in matrix


def test_the_paper_s_figures_that_are_not_drawn_are_listed_beside_its_datasets(study, shown, page):
    assert shown["own"] is False
    assert shown["confusions"] == []
    assert "whose datasets were not measured" not in page


def test_without_the_extra_its_name_is_said(study, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "diptych.report.draw", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"needs matplotlib.*\[report\]"):
        write_report(study, tmp_path / "r.html", title="", command="")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no results folder nowhere"),
        (["nowhere", "--published", "mine"], "write MODEL=NAME"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_needs_neither_torch_nor_matplotlib():
    script = (
        "import sys\nfrom diptych.cli import main\ntry:\n    main(['report', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.rstrip().endswith("[]")


def test_a_file_that_is_broken_is_named(tmp_path):
    made.save_model(tmp_path, made.facts("mine", "runs/mine", 1.0))
    made.save(tmp_path, "mine", "digits", "zeroshot", 0.4)
    (tmp_path / "mine" / "digits" / "zeroshot.json").write_text("[]")
    with pytest.raises(UsageError, match=r"zeroshot\.json cannot be read as a result \(it is no JSON object\)"):
        load_study(tmp_path)
    for broken in ("{}", "[]", "{"):
        (tmp_path / "mine" / "model.json").write_text(broken)
        with pytest.raises(UsageError, match=r"mine/model\.json cannot be read"):
            load_study(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    made.save_model(tmp_path / "results", made.facts("mine", "runs/mine", 1.0))
    made.save(tmp_path / "results", "mine", "digits", "zeroshot", 0.4)
    (tmp_path / "file").write_text("")
    for flag, place, said in (
        ("--out", tmp_path, "is a folder; the report is one file"),
        ("--out", tmp_path / "file" / "report.html", "is a file; name another --out"),
        ("--figures", tmp_path / "file", "is a file; name another --figures"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path / "results"), flag, str(place)])
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
