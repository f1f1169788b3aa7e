import re
from pathlib import Path

import pytest

import diptych
from diptych.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_the_command_line_is_what_help_prints():
    from recipes.docs import PAGE, render

    assert PAGE.read_text("utf-8") == render(), "run `make docs`"


def test_the_tables_of_the_page_on_scaling_are_what_plan_says():
    from recipes.scaling import PAGE, render

    page = PAGE.read_text("utf-8")
    assert page == render(page), "run `make docs`"
    assert page.count("| ViT-L-14 |") == 6


def test_what_the_page_for_users_of_open_clip_names_as_ours_is_there():
    from recipes.docs import PAGE

    page = (ROOT / "docs" / "from-open-clip.md").read_text("utf-8")
    help_of = dict(re.findall(r"## `diptych ([a-z -]+)`\n\n```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    flags = {name: set(re.findall(r"--[a-z0-9-]+", told)) for name, told in help_of.items()}
    training, tuning = re.search(r"## Training(.*)## Fine-tuning(.*)## Python", page, re.DOTALL).groups()
    for part, command in ((training, "train"), (tuning, "finetune")):
        rows = [line.split("|")[2] for line in part.splitlines() if line.startswith("| `")]
        ours = {flag for cell in rows for flag in re.findall(r"--[a-z0-9-]+", cell)}
        assert len(ours) > 2
        assert ours - flags[command] == set(), command
    assert len(re.findall(r"^\| `", training, re.MULTILINE)) > 20
    for line in re.findall(r"^.*-m diptych (.*)$|`diptych ((?:train|finetune) [^`]*)`", page, re.MULTILINE):
        words = "".join(line).split()
        assert {word for word in words if word.startswith("--")} <= flags[words[0]]
    for name in re.findall(r"diptych\.([A-Za-z_]+)", page):
        assert name in diptych.__all__, name
    assert "**The batch size is global here" in page


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"diptych {name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_target_that_is_named_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text("utf-8")))
        assert named <= targets, page.name
