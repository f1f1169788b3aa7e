"""The table of commands. Each imports its rooms when it runs, so that `--help` answers at once.

One file a group of commands. Only these print, and only these and `recipes/` compose rooms.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import tyro

from diptych.cli.checkpoints import Convert, Inspect, Verify
from diptych.cli.classify import Classify
from diptych.cli.curate import Curate
from diptych.cli.embed import Embed
from diptych.cli.evaluate import Evaluate
from diptych.cli.finetune import Finetune, WiseFT
from diptych.cli.plan import Plan
from diptych.cli.report import Report
from diptych.cli.train import Train, with_recipe
from diptych.errors import DiptychError

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


@contextlib.contextmanager
def ending_on_errors() -> Iterator[None]:
    """Let our errors be one line and exit code 2: of commands, and of the recipes."""
    try:
        yield
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with ending_on_errors():
        command: Command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS | {"train": with_recipe(arguments)} if arguments[:1] == ["train"] else COMMANDS,
            prog="diptych",
            description="Build and use CLIP models from end to end.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        sys.exit(command())
