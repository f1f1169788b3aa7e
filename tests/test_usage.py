"""What a person meets who types a command wrong, or asks for its help."""

import io
import re
import shlex
from pathlib import Path

import pytest

from diptych.cli import COMMANDS, _parse, curate, name_flags
from diptych.cli.output import ProgressBar
from samples import TINY_VIT, make_loaded, small, write_samples
from test_cli import call

ROOT = Path(__file__).parents[1]
EVERY = [[name] for name in COMMANDS] + [["curate", name] for name in curate.COMMANDS]


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    """Title -> help, as the page of the command line has it (a test holds it to what is printed)."""
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    return dict(re.findall(r"## `([^`]+)`\n\n```\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_help_has_an_example_that_can_be_typed_and_no_type_for_a_name(page, command):
    title = " ".join(["diptych", *command])
    told = page[title]
    usage = re.sub(r"\[-[^\]]*\]", "", told.split("\n\n", 1)[0])
    assert not re.search(r"\b(STR|PATH|INT)\b", usage), usage
    examples = re.findall(r"Example: (diptych .*)", told.split("╭")[0])
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[1] == command[0]
        assert type(_parse(words[1:])).__name__ == COMMANDS[command[0]].__name__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "diptych: diptych train needs PRESET, --data, --out (diptych train --help shows an example)\n"),
        (["embed", "m", "x"], "diptych: diptych embed needs --out (diptych embed --help"),
        (["train", "--model", "ViT-B-32", "--data", "x"], "diptych train needs PRESET, a positional argument"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--bach-size", "3"], "did you mean --batch-size?"),
        (["curate", "queries", "--out", "q", "--wordlist", "x"], "(diptych curate queries --help shows an example)"),
        (["curate", "match", "--pair", "x"], "did you mean --pairs?"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--steps", "abc"], "diptych: --steps abc is no INT ("),
        (
            ["train", "RN-Ti", "--data", "x", "--out", "y", "--loss", "foo"],
            "invalid choice 'foo' for argument '--loss'",
        ),
        (["classify", "a.jpg", "--labels", "-cat", "b"], "stands in a file, a label on each line: --labels @FILE"),
        (["classify", "-x.png", "--labels", "a", "b"], "is named ./-x.png"),
        (["embed", "m", "x", "--out", "y", "--part-rows", "0"], "diptych: --part-rows 0 must be at least 1"),
        (["train", "RN-Ti", "--data", "x", "--out", "y", "--keep-best", "z"], "diptych: --keep-best z needs"),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.png").touch()
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("diptych: ")
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_only_settings_are_called_as_flags():
    flags = ["--batch-size", "--top", "--data"]
    assert name_flags("top 0 must be at least 1; top that", flags) == "--top 0 must be at least 1; top that"
    assert (
        name_flags("data holds 3 samples, less than batch_size", flags)
        == "data holds 3 samples, less than --batch-size"
    )
    assert name_flags("runs/batch_size/x", flags) == "runs/batch_size/x"


def test_a_label_with_a_dash_comes_from_a_file(tmp_path, capsys):
    from diptych.cli.classify import read_labels

    (tmp_path / "labels.txt").write_text("-cat\n--dog\n")
    assert read_labels([f"@{tmp_path / 'labels.txt'}"], ["a.jpg"]) == ["-cat", "--dog"]


def test_an_evaluation_set_may_be_named_by_its_folder(tmp_path):
    from diptych.cli.training import build_evaluators
    from diptych.errors import UsageError

    write_samples(tmp_path / "pets", 8)
    loaded = make_loaded(small(TINY_VIT))
    (evaluator,) = build_evaluators((str(tmp_path / "pets"),), loaded.tokenizer, loaded.preprocess)
    assert evaluator.name == "pets"
    with pytest.raises(UsageError, match="is not NAME=PATH"):
        build_evaluators((str(tmp_path / "nowhere"),), loaded.tokenizer, loaded.preprocess)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, capsys):
    data = write_samples(tmp_path / "data", 16)
    usual = ["train", "RN-Ti", "--data", data, "--workers", 0, "--precision", "float32", "--batch-size", 8]
    assert call(*usual, "--out", tmp_path / "run", "--steps", 2, "--warmup", 5) == 2
    assert "diptych: --warmup 5 takes all of the 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    assert call(*usual, "--out", tmp_path / "own", "--steps", 2, "--warmup", 5) == 2
    assert (tmp_path / "own").exists()  # it was not ours to take away


def test_more_steps_for_a_run_that_is_there_name_the_flag(tmp_path):
    from diptych.errors import UsageError
    from diptych.train import loop
    from samples import train_config

    data = write_samples(tmp_path / "data", 16)
    loop.run(train_config(data, tmp_path / "run", steps=2, batch_size=8, warmup=0))
    with pytest.raises(UsageError, match=r"steps 2 there, 3 here.*; --steps 2 --extend-to 3 goes on to there"):
        loop.run(train_config(data, tmp_path / "run", steps=3, batch_size=8, warmup=0))


def test_a_narrow_bar_still_shows_the_count(monkeypatch):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    bar = ProgressBar("training")
    bar._bar.live.console = bar._console = console  # type: ignore[attr-defined]
    with bar:
        bar.update(12_345, 50_000, "loss 3.512  1,234 pairs/s  data wait 3%  1:02:03 left")
        console.print(bar._bar.get_renderable())
    assert "training 12345/50000 " in re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue())
