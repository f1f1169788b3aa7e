"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

One file a group of commands. Only these print, and only these and `recipes/` compose rooms.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import tyro

from diptych import __version__
from diptych.cli.checkpoints import Convert, Inspect, Verify
from diptych.cli.classify import Classify
from diptych.cli.curate import Curate
from diptych.cli.embed import Embed
from diptych.cli.evaluate import Evaluate
from diptych.cli.finetune import Finetune, WiseFT
from diptych.cli.output import shorten
from diptych.cli.plan import Plan
from diptych.cli.report import Report
from diptych.cli.train import Train, with_recipe
from diptych.config import hide_secrets
from diptych.errors import DiptychError, UsageError, unknown_name

Command = Train | Finetune | WiseFT | Plan | Curate | Classify | Embed | Evaluate | Report | Inspect | Convert | Verify
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "finetune": Finetune,
    "wise-ft": WiseFT,
    "plan": Plan,
    "curate": Curate,
    "classify": Classify,
    "embed": Embed,
    "evaluate": Evaluate,
    "report": Report,
    "inspect": Inspect,
    "convert": Convert,
    "verify": Verify,
}


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
            yield
        except DiptychError as error:
            _fail(str(error))
        except ModuleNotFoundError as error:
            if (extra := _EXTRA_OF.get((error.name or "").partition(".")[0])) is None:
                raise
            _fail(f"this needs the package {error.name}; install diptych with its extra: pip install '.[{extra}]'")
        except MemoryError as error:
            _fail(f"there is not enough memory ({error or 'no more was given'}); what was done is kept")
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.strerror is None:
                raise
            _fail(describe_os_error(error))
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream.fileno())]
        if not gone:  # it was another pipe, whose end is an error like any other
            raise
        for stream in gone:  # what is still held back would be written, and fail again, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_PIPE_CLOSED)


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
    """Whether it is a pipe whose other end was closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with exit_on_error():
        if arguments[:1] == ["--version"]:
            print(f"diptych {__version__}")
            sys.exit(0)
        sys.exit(_parse(arguments)())


def _parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments name, with its options."""
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name.replace("_", "-") not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"train": with_recipe(arguments)} if name == "train" else COMMANDS,
                prog="diptych",
                description="Build and use CLIP models from end to end; --version tells which release this is.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as ended:
        if error := _find_usage_error(ended):
            told = io.StringIO()
            raise error from None
        raise
    finally:
        sys.stderr.write(told.getvalue())


def _find_usage_error(ended: SystemExit) -> UsageError | None:
    """What a config said of its values: tyro puts it into a box, under a name that no user knows, and exits."""
    cause: BaseException | None = ended
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__context__
    return cause
