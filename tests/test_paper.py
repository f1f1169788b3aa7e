"""docs/paper.md names files and commands: all of them exist, and show what is said of them."""

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

import made_up_results
from diptych.cli import COMMANDS, curate, main
from diptych.evaluate.references import PAPER27, SHIFTS, TABLES

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


# --- what the rows promise ---

REPORT = {
    "3.1.3, Table 1: Visual N-Grams": ("Visual N-Grams", "11.50"),
    "Figure 13, Table 16: natural shifts": ("Robustness to natural shifts", "imagenet_sketch"),
    "rows that nobody reproduces": ("nobody reproduces it",),
    "A.1, Table 9: datasets": PAPER27,
    "A.4, Table 10, Figure 20: all probes": ("<h3>probe</h3>", "published %", "Figure 20."),
    "B, Table 11, Figure 22: all zero-shot results": ("<h3>zeroshot</h3>", "published %", "Figure 22."),
    "D, Table 12: YFCC against WIT": ("RN50-YFCC15M", "RN50-WIT15M", "66.60"),
    "E.1, Table 13: retrieval": ("<h2>Retrieval</h2>", "picture to text R@10", "published by the paper"),
    "E.2, Table 14, Figure 19: reading": ("<td>rendered_sst2<", "<td>mnist<", "<td>hateful_memes<"),
    "E.3, Table 15: actions": ("<td>ucf101<", "<td>kinetics700<", "mean_top1_top5"),
    "E.4, Table 17: geolocation": ("<td>country211<",),
    "E.5, Table 16: robustness": ("Robustness to natural shifts", *SHIFTS),
    "7.1, Tables 3 to 5: race, gender and age by group": ("Probe of bias", "White", "Male"),
    "Tables 6 and 7: denigration, with and without `child`": ("Probe of bias: non human", "Probe of bias: crime"),
}
"""Rows of the page that name a table -> what of them must be in the report of results of every protocol."""
TOWERS = ("image 87,849,216", "text 63,428,096", "forward 9.43 G")
PRINTED = {
    "2.4 the towers": TOWERS,
    "2.5 training: batch 32,768, mixed precision, sharded similarities": ("(default: 32768)", "--precision"),
    "2.5 the optimizer and its schedule": ("cosine decay", "(default: 0.0005)", "(default: 2000)", "(default: 0.2)"),
    "F, Tables 18 to 20: hyper-parameters": ("(default: 32768)", "(default: 32.0)", "(default: 0.98)"),
}
"""Rows whose command prints what they are about -> what that is: of `plan`, or of the recipe's help."""
NOT_DONE = re.compile(r"not done|not to be had")


def rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """First cell -> the others, of every row of the page's tables."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {first.strip(): tuple(others) for first, *others in rows if first != "paper"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page that `diptych report` writes, and the figures that it says are drawn."""
    folder = made_up_results.write(tmp_path_factory.mktemp("paper") / "results")
    nets = [f"net{i},{50 + 5 * i},{','.join(str(30 + 4 * i) for _ in SHIFTS)}" for i in range(4)]
    table = folder.parent / "nets.csv"
    table.write_text("\n".join([f"model,imagenet,{','.join(SHIFTS)}", *nets]))
    printed = run_command("report", str(folder), "--imagenet-models", str(table), "--json")
    return (folder / "report.html").read_text("utf-8"), set(json.loads(printed)["drawn"])


def run_command(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return printed.getvalue()


def test_every_row_that_promises_a_table_or_prints_numbers_is_looked_at():
    promising = {
        name
        for name, cells in rows_of(PAGE).items()
        if not NOT_DONE.search(" ".join(cells[:1]).partition(";")[0])
        and (re.search(r"Tables? \d", name) or re.search(r"`diptych (report|plan)|--help`", cells[-1]))
    }
    assert promising == {*REPORT, *PRINTED}


def test_the_report_shows_the_tables_that_the_rows_promise(report):
    page, _ = report
    lacking = {name: [phrase for phrase in shown if phrase not in page] for name, shown in REPORT.items()}
    assert {name: phrases for name, phrases in lacking.items() if phrases} == {}


def test_the_report_draws_the_figures_that_the_rows_promise(report):
    _, drawn = report
    promised = {
        number
        for name, cells in rows_of(PAGE).items()
        for number in re.findall(r"Figure (\d+)", name)
        if "evaluate/report/figures/" in cells[0]
    }
    assert len(promised) > 12
    assert promised == drawn


def test_the_commands_print_what_the_rows_promise():
    from recipes.docs import read_help

    printed = {
        "plan": run_command("plan", "ViT-B-32"),
        "train": read_help(["train", "ViT-B-16", "--recipe", "paper"]),
    }
    texts = {command: " ".join(text.split()) for command, text in printed.items()}
    for name, shown in PRINTED.items():
        command = re.search(r"`diptych (plan|train)", rows_of(PAGE)[name][-1])
        assert command is not None
        assert [phrase for phrase in shown if phrase not in texts[command[1]]] == [], name
