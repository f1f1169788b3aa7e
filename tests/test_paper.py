"""docs/paper.md names files and commands: all of them exist."""

import importlib.util
import re
from pathlib import Path

import pytest

import made_up_results
from diptych.cli import COMMANDS, curate
from diptych.evaluate.references import TABLES
from diptych.evaluate.report.html import write_report
from diptych.evaluate.report.results_table import load_study

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text("utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE) + [
    line.split("  ")[0] for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_every_file_that_is_named_exists():
    named = {word for word in CODE if re.fullmatch(r"[\w/.-]+\.(py|csv|md)|[a-z]+/[a-z]+/?", word)}
    assert len(named) > 50
    missing = [name for name in named if not (ROOT / "src" / "diptych" / name).exists() and not (ROOT / name).exists()]
    assert missing == []


def test_every_command_that_is_named_exists():
    named = {words.split()[1] for words in CODE if words.startswith("diptych ")}
    assert named >= {"evaluate", "report", "train", "curate"}
    assert named <= set(COMMANDS)
    stages = {words.split()[2] for words in CODE if words.startswith("diptych curate ")}
    assert stages <= set(curate.COMMANDS)


def test_every_option_that_is_named_exists():
    from recipes.docs import read_help

    for words in CODE:
        if words.startswith("diptych ") and words.split()[1] in COMMANDS:
            arguments = words.split()[1:3] if words.split()[1] == "curate" else words.split()[1:2]
            options = re.findall(r"--[a-z-]+", words)
            if options:
                text = read_help(arguments)
                assert [option for option in options if option not in text] == [], words


def test_every_recipe_and_target_that_is_named_exists():
    recipes = {words.split()[2] for words in CODE if words.startswith("python -m ")}
    assert recipes >= {"recipes.datasets", "recipes.faces"}
    assert all(importlib.util.find_spec(name) for name in recipes)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words.split()[1] for words in CODE if words.startswith("make ")} <= targets
    benchmarks = {words.partition("NAME=")[2] for words in CODE if "NAME=" in words}
    assert [name for name in benchmarks if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []


def test_every_function_that_is_named_is_in_its_file():
    found = 0
    for file, functions in re.findall(r"`([\w/]+\.py)` \(((?:`\w+`(?:, )?)+)[:)]", PAGE):
        text = (ROOT / "src" / "diptych" / file).read_text("utf-8")
        for name in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), (file, name)
            found += 1
    assert found > 15


def test_every_figure_that_can_be_drawn_has_its_row():
    from diptych.evaluate.report.figures import build

    for number, function in build.FIGURES.items():
        rows = [line for line in PAGE.splitlines() if re.search(rf"Figure {number}\b", line)]
        assert any(f"`{function.__name__}`" in row and "diptych evaluate" in row for row in rows), number


@pytest.mark.parametrize("number", range(1, 19))
def test_every_figure_of_the_main_text_is_mentioned(number):
    assert re.search(rf"Figure {number}\b", PAGE)


@pytest.mark.parametrize("number", range(1, 21))
def test_every_table_of_the_paper_is_mentioned(number):
    spans = re.findall(r"Tables (\d+) (to|and) (\d+)", PAGE)
    inside = any(int(first) <= number <= int(last) for first, _, last in spans)
    assert inside or re.search(rf"Table {number}\b", PAGE)


def test_the_tables_of_published_numbers_are_those_that_lie_there():
    folder = ROOT / "src" / "diptych" / "assets" / "reference"
    assert {path.name for path in folder.iterdir()} == {*TABLES, "caveats.csv"}


PROMISED = {
    "3.1.3, Table 1: Visual N-Grams": ("Visual N-Grams", "11.50"),
    "D, Table 12: YFCC against WIT": ("RN50-YFCC15M", "RN50-WIT15M", "66.60"),
    "Figure 13, Table 16: natural shifts": ("Robustness to natural shifts", "imagenet_sketch"),
    "rows that nobody reproduces": ("nobody",),
}
"""Rows of the page whose command is `diptych report results`, and what of them must be on the page it writes."""


def test_the_report_shows_what_the_rows_that_name_it_promise(tmp_path):
    named = [line for line in PAGE.splitlines() if line.startswith("|") and "`diptych report results" in line]
    assert {line.strip("| ").split(" | ")[0] for line in named} == set(PROMISED)
    study = load_study(made_up_results.write(tmp_path / "results"))
    write_report(study, tmp_path / "report.html", title="", command="")
    page = (tmp_path / "report.html").read_text("utf-8")
    for name, shown in PROMISED.items():
        assert [phrase for phrase in shown if phrase not in page] == [], name
