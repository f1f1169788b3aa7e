"""What commands print, on terminals and into logs, about names that anybody may have given."""

import io
import json
import os
import subprocess
import sys

import pytest

from diptych.checkpoint import layouts
from diptych.cli import describe_os_error, exit_on_error, main, output
from diptych.cli.output import ProgressBar, list_counts, print_on_first_rank, printable, shorten
from samples import TINY_VIT, make_loaded, small

HOSTILE = ["a\x1b]0;PWNED\x07b", "\x1b[2J", "a\rb", "a\nb", "\x9b31m", "\u202egpj.exe", "\udcff", "\0", "\x7f"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_steers_the_terminal(name):
    shown = printable(name)
    assert shown.isprintable()
    assert shown.isascii()
    assert shown.encode()


@pytest.mark.parametrize("name", ["a cat", "犬", "année", "👩‍🔬", "[bold]", "می‌خواهم", "C:\\pictures"])
def test_names_of_all_alphabets_stay_as_they_are(name):
    assert printable(name) == name


def test_a_line_has_an_end():
    assert shorten("x" * 1_000_000, 100) == "x" * 100 + " ... (1,000,000 characters)"
    assert list_counts({"a\x1b": 1, "": 2, "none": 0}) == "no suffix 2, a\\x1b 1"


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 10.0, 31.0, 31.0, 32.0, 33.0, 33.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with ProgressBar("training") as bar:
        for done, status in ((1, "loss 3.000"), (2, ""), (3, "loss 2.000"), (9, "loss 1.000"), (9, "loss 1.000")):
            bar.update(done, 9, status)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1 of 9  loss 3.000",
        "training: 3 of 9  loss 2.000",
        "training: 9 of 9  loss 1.000",
    ]


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with ProgressBar("training") as bar:
        bar.update(1, 9)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (28, "make room there"),
        (13, "give permission"),
        (30, "can be written"),
        (24, "ulimit -n"),
        (27, "ulimit -f"),
        (5, ""),
    ],
)
def test_what_the_system_refuses_is_one_line(number, advice, capsys):
    error = OSError(number, os.strerror(number), "/somewhere/a.jpg")
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == 2
    assert advice in describe_os_error(error)
    printed = capsys.readouterr().err
    assert printed == f"diptych: {describe_os_error(error)}\n"
    assert printed.startswith("diptych: /somewhere/a.jpg: ")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_of_a_job_is_one_line(name, capsys):
    print_on_first_rank(f"12 pairs; {name}")
    assert capsys.readouterr().out == f"12 pairs; {printable(name)}\n"


def test_a_shortage_of_memory_is_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_error():
        raise MemoryError
    assert capsys.readouterr().err.startswith("diptych: there is not enough memory")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_can_show_any_name(encoding, tmp_path):
    script = """
from diptych.cli import exit_on_error
from diptych.cli.classify import Answer, print_bars
with exit_on_error():
    print_bars("犬\\udcff [final].png", [Answer("[bold]cat", 0.75, None, None), Answer("犬", 0.25, None, None)])
"""
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    assert "[final].png" in lines[0]
    assert "[bold]cat" in lines[1]
    assert ("█" if encoding == "utf-8" else "#") * 22 in lines[1]


def test_json_is_what_machines_read_whatever_the_names_are():
    script = """
from diptych.cli.classify import Answer, print_json
print_json("a\\x1b.png", [Answer("[/INST]", 0.5, None, None)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"image": "a\x1b.png", "labels": [{"label": "[/INST]", "probability": 0.5}]}
    assert io.StringIO(done.stdout).read().count("\n") == 1


def test_a_package_of_an_extra_that_is_missing_is_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_error():
        raise ModuleNotFoundError("No module named 'orjson'", name="orjson")
    assert "install diptych with its extra: pip install '.[curate]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), exit_on_error():
        raise ModuleNotFoundError("No module named 'diptych.nothing'", name="diptych.nothing")


def test_a_command_without_stdin_and_stdout_ends_as_it_should():
    script = "import os, sys; sys.stdout = None; from diptych.cli import main; main(['inspect', 'nowhere'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize("name", HOSTILE[:6])
def test_what_a_checkpoint_is_called_does_not_steer_the_terminal(name, tmp_path, capsys):
    layouts.save(make_loaded(small(TINY_VIT)), folder := tmp_path / name.replace("\0", ""))
    for command in (["inspect"], ["inspect", "--json"], ["verify"]):
        with pytest.raises(SystemExit):
            main([command[0], str(folder), *command[1:]])
        assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
