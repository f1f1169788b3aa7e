"""`make docs`: write docs/cli.md from the commands' own help, so that it cannot say anything else."""

import os
import subprocess
import sys
from pathlib import Path

from diptych.cli import COMMANDS, curate, shards, tokenizer

ROOMS = {"shards": shards, "curate": curate, "tokenizer": tokenizer}
PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def render() -> str:
    """The page: the table of commands, then each command's help."""
    sections = ["# The command line", "", "Written by `make docs` from `--help`; do not edit."]
    stages = [[group, name] for group, room in ROOMS.items() for name in room.COMMANDS]
    for arguments in ([], *([name] for name in COMMANDS), *stages):
        title = " ".join(["diptych", *arguments])
        sections += ["", f"## `{title}`", "", "```", read_help(arguments), "```"]
    return "\n".join(sections) + "\n"


def read_help(arguments: list[str]) -> str:
    """What `diptych ARGUMENTS --help` prints, 100 columns wide, without colours."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "diptych", *arguments, "--help"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in printed.strip().splitlines())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
