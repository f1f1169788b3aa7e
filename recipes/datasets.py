"""Make the datasets that need no network: digits, rendered text, counting. `python -m recipes.datasets OUT`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diptych.cli import exit_on_error
from recipes.made.datasets import MADE, make_datasets


@dataclass(frozen=True)
class Datasets:
    """Make datasets on this machine, as folders that `diptych evaluate --data OUT --suite made` finds."""

    out: Annotated[Path, tyro.conf.Positional]
    """Gets a folder for each dataset; those that are there are kept."""
    names: tuple[str, ...] = tuple(MADE)
    """digits (needs scikit-learn), rendered_text, counting."""


def main(config: Datasets) -> None:
    """Make them, and say where they are."""
    for name in make_datasets(config.out, config.names):
        print(config.out / name)


if __name__ == "__main__":
    with exit_on_error():
        main(tyro.cli(Datasets, description=__doc__))
