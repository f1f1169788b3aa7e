"""Another checkout beside this one, in turn: what a change of the code did to its speed.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before [train_small embed embed_folder extract loader]

Each side runs the worker of its own benchmark file, on the same data. Ratios are this checkout's over the other's:
above 1 where this one is better.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embed_folder
import extract
import harness
import train
import train_small

EMBED_MODEL, EMBED_BATCH = "ViT-B-32-quickgelu", 32


def train_small_args(folder: Path) -> list[Any]:
    """bfloat16 training of a 64-px ViT, batch 256."""
    train.write_data(folder / "shards", samples=2048)
    return ["ours", folder / "shards", "bfloat16", train_small.pack({})]


def embed_args(folder: Path) -> list[Any]:
    """Image features of tensors in bfloat16, batch 32."""
    program = """
import sys
import torch
import diptych
from diptych.checkpoint import layouts
from diptych.checkpoint.loaded import Loaded
from diptych.image import Preprocess
from diptych.model.clip import CLIP
from diptych.model.config import get_preset
torch.manual_seed(0)
model = CLIP(get_preset("ViT-B-32")).eval()
layouts.save(Loaded(model, Preprocess(image_size=224), diptych.Tokenizer.clip()), sys.argv[1], "open_clip")
"""
    subprocess.run([sys.executable, "-c", program, folder / "open_clip"], check=True, env=harness.ours_env())
    return ["ours", folder, "bfloat16", EMBED_BATCH]


def embed_folder_args(folder: Path) -> list[Any]:
    """A folder of JPEGs to features, decoding included."""
    embed_folder.write_pictures(folder, 256)
    return ["ours", folder, "auto"]


def extract_args(folder: Path) -> list[Any]:
    """Candidates out of a WARC of made pages, on one core."""
    extract.build_archive(folder / "made.warc.gz")
    return ["--work", "ours", folder / "made.warc.gz"]


def loader_args(folder: Path) -> list[Any]:
    """Batches of 64-px crops out of shards, on one core."""
    train.write_data(folder / "shards", samples=2048)
    return ["ours", folder / "shards", 64]


CASES: dict[str, tuple[Callable[[Path], list[Any]], str, bool]] = {
    "train_small": (train_small_args, "pairs/s", False),
    "embed": (embed_args, "images/s", False),
    "embed_folder": (embed_folder_args, "images/s", False),
    "extract": (extract_args, "MB/s", True),
    "loader": (loader_args, "samples/s", True),
}
"""Benchmark -> arguments of its worker, unit, and whether it runs on one core."""


def run_case(name: str, other: Path, rounds: int) -> dict[str, Any]:
    """Measure both checkouts in turn."""
    make, unit, alone = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(one) for one in make(Path(folder))]
        contestants = [
            harness.Contestant(
                side,
                [harness.OURS_PYTHON, root / "benchmarks" / f"{name}.py", *arguments],
                {"PYTHONPATH": str(root / "src"), **(harness.ONE_THREAD if alone else {})},
                harness.one_core() if alone else None,
            )
            for side, root in (("ours", harness.ROOT), ("before", other))
        ]
        done = harness.run_rounds(contestants, rounds)
        turned = harness.run_rounds(contestants[::-1], rounds)  # who comes second in a round is up to 4 % faster
    for side, values in turned.values.items():
        done.values[side] += values
    first = done.values["ours"][0]
    if isinstance(first, dict):
        done = done.pick(unit if unit in first else next(iter(first)))
    print(name, {side: [round(value, 2) for value in values] for side, values in done.values.items()}, flush=True)
    return done.row(name, unit, "before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("cases", nargs="*", default=list(CASES), help="which benchmarks")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in each of the two orders")
    options = parser.parse_args()
    other = options.other.resolve()
    commit = subprocess.run(["git", "-C", other, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    rows = [run_case(name, other, options.rounds) for name in options.cases]
    harness.report("checkouts", rows, before=commit.stdout.strip(), cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
