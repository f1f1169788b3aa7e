"""How many flags each command has, counted in docs/cli.md: one more or less is a decision, and LOG.md says why."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "cli.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## `diptych ([a-z -]+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FLAGS = {
    "train": 44,
    "finetune": 52,
    "wise-ft": 5,
    "plan": 13,
    "curate": 0,
    "classify": 13,
    "embed": 15,
    "evaluate": 22,
    "report": 6,
    "inspect": 3,
    "convert": 8,
    "verify": 2,
    "curate queries": 14,
    "curate crawl": 15,
    "curate filter": 17,
    "curate distinct": 11,
    "curate match": 7,
    "curate balance": 10,
    "curate fetch": 32,
    "curate pictures": 14,
    "curate write": 9,
    "curate contamination": 10,
    "curate delete": 4,
    "curate run": 12,
}


def count_flags(section: str) -> int:
    """A flag and its opposite (`--augment, --no-augment`) are one; help does not count."""
    return len(re.findall(r"^│ (?:-\w, )?--(?!help)[a-z]", section, re.MULTILINE))


def test_every_command_is_counted():
    assert SECTIONS.keys() == FLAGS.keys(), "a new command needs a LOG entry, and its count here"


@pytest.mark.parametrize("command", FLAGS)
def test_a_command_has_the_flags_it_had(command):
    found = count_flags(SECTIONS[command])
    assert found == FLAGS[command], (
        f"{command}: {found} flags instead of {FLAGS[command]}; a new flag needs a LOG entry"
    )
