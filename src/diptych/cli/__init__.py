"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

One file a group of commands. Only these print, and only these and `recipes/` compose rooms.
"""

import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import select
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from diptych import __version__
from diptych.cli.checkpoints import Convert, Inspect, Verify
from diptych.cli.classify import Classify
from diptych.cli.curate import Curate
from diptych.cli.embed import Embed
from diptych.cli.evaluate import Evaluate
from diptych.cli.finetune import Finetune, WiseFT
from diptych.cli.models import Models
from diptych.cli.output import shorten
from diptych.cli.plan import Plan
from diptych.cli.report import Report
from diptych.cli.shards import Shards
from diptych.cli.tokenizer import Tokenize
from diptych.cli.train import Train, with_recipe
from diptych.config import hide_secrets, require_finite
from diptych.errors import DiptychError, PictureWarning, UsageError, install, unknown_name
from diptych.machine import share_cores

Command = (
    Train
    | Finetune
    | WiseFT
    | Plan
    | Shards
    | Curate
    | Classify
    | Embed
    | Evaluate
    | Report
    | Models
    | Inspect
    | Convert
    | Verify
    | Tokenize
)
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "finetune": Finetune,
    "wise-ft": WiseFT,
    "plan": Plan,
    "shards": Shards,
    "curate": Curate,
    "classify": Classify,
    "embed": Embed,
    "evaluate": Evaluate,
    "report": Report,
    "models": Models,
    "inspect": Inspect,
    "convert": Convert,
    "verify": Verify,
    "tokenizer": Tokenize,
}


_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
_REPEATABLE = {("evaluate", "--model")}
"""Options that count as often as they are given; of any other the parser would take the last and drop the rest."""
_PIPE_CLOSED = 128 + 13
"""What a shell makes of a program that SIGPIPE ended."""


_EXTRA_OF = {
    **dict.fromkeys(
        ("orjson", "selectolax", "ada_url", "resiliparse", "py3langid", "aiohttp", "aiodns", "webencodings"), "curate"
    ),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **{name: name for name in ("timm", "transformers", "ray", "tensorboard", "wandb")},
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "peft": "lora",
}
"""Package -> the extra of ours that brings it."""


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of ours, or of the disk, as one line and exit with code 2, in commands and recipes alike. A closed
    stdout (`| head`) ends the program quietly."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that are not UTF-8, signs that the terminal does not have
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", PictureWarning)
                warnings.showwarning = _show_warning
                yield
        except DiptychError as error:
            _fail(str(error))
        except ModuleNotFoundError as error:
            if (extra := _EXTRA_OF.get((error.name or "").partition(".")[0])) is None:
                raise
            _fail(f"this needs the package {error.name}; install diptych with its extra: {install(extra)}")
        except MemoryError as error:
            _fail(f"there is not enough memory ({error or 'no more was given'}); what was done is kept")
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.strerror is None:
                raise
            _fail(describe_os_error(error))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            if sys.stdout:  # there is none if it was closed
                sys.stdout.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if stream and _has_no_reader(stream.fileno())]
        if not gone:  # it was another pipe, whose end is an error like any other
            raise
        for stream in gone:  # what is still held back would be written, and fail again, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_PIPE_CLOSED)


def _show_warning(message: Warning | str, *_: object) -> None:
    """One line, without the place in our code."""
    print(f"warning: {shorten(message)}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    print(f"diptych: {shorten(hide_secrets(message))}", file=sys.stderr)
    sys.exit(2)


def describe_os_error(error: OSError) -> str:
    """What the system refused, with which file, and what to do about it."""
    advice = {
        errno.ENOSPC: "; make room there, then start the same command again: it goes on from what is whole",
        errno.EDQUOT: "; make room there, then start the same command again: it goes on from what is whole",
        errno.EFBIG: "; files may not grow so large here: raise the limit (ulimit -f), then start it again",
        errno.EMFILE: "; raise the limit of open files (ulimit -n), then start it again",
        errno.ENFILE: "; close other programs, then start it again",
        errno.EACCES: "; give permission, or name another place",
        errno.EPERM: "; give permission, or name another place",
        errno.EROFS: "; name a place that can be written",
    }
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{place}{error.strerror}{advice.get(error.errno or 0, '')}"


def _has_no_reader(descriptor: int) -> bool:
    """Whether it is a pipe whose other end was closed; where nobody can tell, it is."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    share_cores()
    arguments = sys.argv[1:] if arguments is None else arguments
    with exit_on_error():
        if arguments[:1] == ["--version"]:
            print(f"diptych {__version__}")
            sys.exit(0)
        try:
            sys.exit(_parse(arguments)())
        except UsageError as error:
            raise UsageError(name_flags(str(error), _list_flags(arguments))) from None


def _parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments name, with its options."""
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name.replace("_", "-") not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    _refuse_odd(name, arguments)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            command = tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"train": with_recipe(arguments)} if name == "train" else COMMANDS,
                prog="diptych",
                description="Build and use CLIP models from end to end; --version tells which release this is.",
                args=arguments,
                config=_STYLE,
            )
        require_finite(command)
        return command
    except SystemExit as ended:
        if error := _find_usage_error(ended):
            told = io.StringIO()
            raise error from None
        if ended.code and (refused := _read_box(told.getvalue())):
            told = io.StringIO()
            raise UsageError(_explain(refused, arguments)) from None
        raise
    finally:
        sys.stderr.write(_name_command(told.getvalue(), arguments))


def _refuse_odd(command: str, arguments: Sequence[str]) -> None:
    """UsageError for an empty argument, which as a path would be the folder we are in, and for an option that is given
    twice."""
    before = ("the first", *arguments)
    if empty := [name for name, one in zip(before, arguments, strict=False) if one == ""]:
        raise UsageError(f"the argument behind {empty[0]} is empty; is it a variable that was not set?")
    if unset := [one for one in arguments if re.fullmatch(r"--[\w-]+=", one)]:
        raise UsageError(f"{unset[0]} has no value; is it a variable that was not set?")
    options = itertools.takewhile(lambda one: one != "--", arguments)
    flags = Counter(one.partition("=")[0].replace("_", "-") for one in options if one.startswith("--"))
    if twice := [flag for flag, count in flags.items() if count > 1 and (command, flag) not in _REPEATABLE]:
        raise UsageError(f"{twice[0]} is given {flags[twice[0]]} times; give it once, with all its values behind it")


def _name_command(told: str, arguments: Sequence[str]) -> str:
    """Tyro's box with the help of the command that was called, where it points to that of all."""
    depth = 2 if arguments[:1] in (["curate"], ["shards"]) else 1
    called = itertools.takewhile(lambda one: not one.startswith("-"), arguments[:depth])
    helped = " ".join(["run diptych", *called, "--help"])
    return re.sub(r"run diptych --help *", lambda found: helped.ljust(len(found[0])), told)


def _list_flags(arguments: Sequence[str]) -> list[str]:
    """The flags of the command that the arguments name."""
    told, command = io.StringIO(), arguments[: 2 if arguments[:1] == ["curate"] else 1]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="diptych", args=[*command, "--help"], config=_STYLE)
    return list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", told.getvalue())))


def name_flags(message: str, flags: Sequence[str]) -> str:
    """A message about settings, with the settings called as on the command line.

    >>> name_flags("batch_size 0 must be at least 1", ["--batch-size"])
    '--batch-size 0 must be at least 1'
    """
    for flag in flags:
        name = flag[2:].replace("-", "_")
        found = rf"(?<![\w/.-]){name}(?![\w/.-])" if "_" in name else rf"^{name}(?= -?(?:\d|nan|inf))"
        message = re.sub(found, flag, message)
    return message


def _read_box(told: str) -> list[list[str]]:
    """The parts of the box in which tyro refuses arguments, each as its lines: what is indented twice is left out. Its
    lines are drawn with letters where the terminal has no others."""
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", told).splitlines()[1:]:
        text = line.strip("│╰╯")[0 if line.startswith("│") else 1 :]
        if text.strip() and not text.strip(" ─-"):
            parts.append([])
        elif text.strip() and not text.startswith(" " * 9):
            parts[-1].append(text.strip())
    return [part for part in parts if part and not part[0].startswith(("For full helptext", "Argument helptext"))]


def _explain(parts: Sequence[Sequence[str]], arguments: Sequence[str]) -> str:
    """What tyro refuses as one line, with what may have been meant."""
    command = " ".join(["diptych", *arguments[: 2 if arguments[:1] == ["curate"] else 1]])
    said = []
    for first, *rest in parts:
        whole = " ".join([first, *rest])
        if first.startswith("Missing from"):
            said.append(f"{command} needs {', '.join(line.split(' ')[0] for line in rest)}")
        elif first.startswith("Missing value for argument 'preset'"):
            said.append(f"{command} needs PRESET, a positional argument")
        elif first.startswith("Unrecognized options"):
            unknown = [word.rstrip(",") for word in whole.partition(":")[2].split()]
            said.append(f"unknown options: {' '.join(unknown)}{_suggest(unknown, arguments)}")
        elif wrong := re.match(r"Error parsing (\S+): no type matching (?:{None}\|)?(\S+) .*? from \['(.*?)'\]", whole):
            said.append(f"{wrong[1]} {wrong[3]} is no {wrong[2]}")
        elif not first.startswith(("Perhaps you meant", "Got errors")):
            said.append(whole)
    return f"{'; '.join(said)} ({command} --help shows an example)"


def _suggest(unknown: Sequence[str], arguments: Sequence[str]) -> str:
    """What an option that is none may have been meant as."""
    first = unknown[0]
    flags = _list_flags(arguments)
    known = difflib.get_close_matches(first, flags, 1, 0.75) or [flag for flag in flags if flag[2:] in first[2:]]
    if first.startswith("--") and known:
        return f"; did you mean {known[0]}?"
    if Path(first).is_file():
        return f"; a file whose name begins with a dash is named ./{first}"
    if "--labels" in arguments and not first.startswith("--"):
        return "; a label that begins with a dash stands in a file, a label on each line: --labels @FILE"
    return ""


def _find_usage_error(ended: SystemExit) -> UsageError | None:
    """What a config said of its values: tyro puts it into a box, under a name that no user knows, and exits."""
    cause: BaseException | None = ended
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__context__
    return cause
