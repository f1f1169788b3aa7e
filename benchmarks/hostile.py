"""Hostile checkpoints, each loaded in a process of its own: does anything run, how does it end, how much memory.

    python benchmarks/hostile.py          (make hostile)

The cases are those of tests/checkpoint/hostile.py. A row counts cases of one kind: `ours` is how many ended in one
clear line with nothing executed, `peer` how many there are; the last row is the largest peak of memory of any case.
"""

import os
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from harness import ROOT, report

sys.path.insert(0, str(ROOT / "tests"))
from checkpoint.hostile import CASES, iter_honest  # pyright: ignore[reportMissingImports]
from diptych.checkpoint import layouts
from diptych.errors import DiptychError

MEMORY_BOUND = 1 << 30


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Make the file here, load it in a child that may come to harm."""
    canary = folder / "canary"
    (folder / "files").mkdir()
    place = CASES[name](folder / "files", canary)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, outcome(place).encode()[:4000])
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        line = answer.read()
    _, status, usage = os.wait4(child, 0)
    return {
        "line": line.replace(str(folder), ""),
        "peak": usage.ru_maxrss * 1024,
        "sound": status == 0 and not canary.exists() and line.startswith("refused: ") and line.isprintable(),
    }


def kind_of(name: str) -> str:
    first = name.split("_")[0]
    return {
        "forged": "folder",
        "config": "folder",
        "transformers": "folder",
        "shard": "folder",
        "tokenizer": "folder",
        "tensor": "storage",
    }.get(first, first if first in ("pickle", "storage", "zip", "torchscript", "safetensors", "truncated") else "other")


def outcome(place: Path) -> str:
    try:
        layouts.load(place, activation="quick_gelu")
    except DiptychError as error:
        return f"refused: {error}"
    except BaseException as error:  # whatever it is, it is not one clear line
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main() -> None:
    torch.set_num_threads(1)  # a forked child has no other threads
    with tempfile.TemporaryDirectory() as folder:
        for place in iter_honest(Path(folder)):
            layouts.load(place, activation="quick_gelu")
    sound: Counter[str] = Counter()
    peaks: dict[str, float] = defaultdict(float)
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            result = run_case(name, Path(folder))
        kind = kind_of(name)
        sound[kind] += result["sound"]
        peaks[kind] = max(peaks[kind], result["peak"])
        if not result["sound"] or result["peak"] > MEMORY_BOUND:
            print(f"FAILED {name}: {result['line']} ({result['peak'] / 2**20:.0f} MiB)")
    counts = Counter(map(kind_of, CASES))
    rows = [row(f"{kind}: refused in one line", sound[kind], count, "cases") for kind, count in sorted(counts.items())]
    rows.append(row("all: refused in one line", sound.total(), len(CASES), "cases"))
    peak = max(peaks.values()) / 2**20
    rows.append(row("largest peak memory of a case", peak, MEMORY_BOUND / 2**20, "MiB"))
    report("hostile", rows)
    sys.exit(sound.total() != len(CASES) or peak > MEMORY_BOUND / 2**20)


def row(case: str, ours: float, bound: float, unit: str) -> dict[str, Any]:
    """As the other tables; above 1, or equal to it, is good."""
    ratio = bound / ours if unit == "MiB" else ours / bound
    return {"case": case, "ours": ours, "peer": bound, "peer_name": "bound", "unit": unit, "ratio": ratio}


if __name__ == "__main__":
    main()
