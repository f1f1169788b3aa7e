"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

One file a group of commands. Only these print, and only these and `recipes/` compose rooms.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence

import tyro

from diptych import __version__
from diptych.cli.checkpoints import Convert, Inspect, Verify
from diptych.cli.classify import Classify
from diptych.cli.curate import Curate
from diptych.cli.embed import Embed
from diptych.cli.evaluate import Evaluate
from diptych.cli.finetune import Finetune, WiseFT
from diptych.cli.plan import Plan
from diptych.cli.report import Report
from diptych.cli.train import Train, with_recipe
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


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Let our errors be one line and exit code 2: of commands, and of the recipes. Whoever reads what is printed may
    stop at any line."""
    try:
        try:
            yield
        except DiptychError as error:
            print(f"diptych: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream.fileno())]
        if not gone:  # it was another pipe, which is not for us to pass over
            raise
        for stream in gone:  # what is still held back would be written, and fail again, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_PIPE_CLOSED)


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
