"""What all benchmarks share: workers measured in turn, the machine's own speed, one table, one JSON form.

A benchmark file is both sides. Started plainly it is the parent: it names contestants, lets `run_rounds`
measure them in turn (A B A B ...) and hands rows to `report`. Started by the parent with arguments, under
either environment's Python, it is a worker: it prepares its contestant and calls `answer(measure)`. So this
file imports nothing that only one of the environments has.

    python benchmarks/harness.py      prints the machine's figures
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS_PYTHON = Path(sys.executable)
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

_MARK = "@worker"  # libraries print too; only lines that begin so are answers
SMALLER_IS_BETTER = {"s", "ms", "us", "s/step", "ms/step", "bytes", "MiB", "GiB", "error"}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def require_peers() -> None:
    """End with one line when the peers' environment has not been built."""
    if not PEERS_PYTHON.exists():
        sys.exit(f"{PEERS_PYTHON.relative_to(ROOT)} is missing: run `make peers` first")


def ours_env() -> dict[str, str]:
    """The environment of a process of ours: this folder's package, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def one_core() -> frozenset[int]:
    """The last core we may use: all contestants of a one-core case share it, so that it is no advantage."""
    return frozenset({max(os.sched_getaffinity(0))})


@dataclass(frozen=True)
class Contestant:
    """How to start one worker process."""

    name: str
    command: Sequence[str | Path]
    """Python, script and arguments."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set on top of this process' environment."""
    cores: frozenset[int] | None = None
    """Cores the worker may use; None: all of ours."""


Figure = float | dict[str, float]


class Worker:
    """A running contestant: prepared once, measured on demand, idle (waiting for a line) in between."""

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        self.process = subprocess.Popen(
            contestant.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ours_env(), **contestant.env},
        )
        if contestant.cores:
            os.sched_setaffinity(self.process.pid, contestant.cores)  # before it has any other thread
        self.about: dict[str, Any] = self._read()

    def measure(self) -> Figure:
        assert self.process.stdin is not None
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise RuntimeError(f"the worker {self.name!r} ended with code {self.process.wait()}; its error is above")


def answer(measure: Callable[[], Figure], **about: Any) -> None:
    """The worker's side, called when all is prepared: one figure per request, until the parent is done.

    `about` reaches the parent as `Rounds.about`: versions, check sums, whatever belongs to the contestant.
    """
    print(_MARK, json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(_MARK, json.dumps(measure()), flush=True)


@dataclass(frozen=True)
class Rounds:
    """What the contestants of one case reached, round by round."""

    values: dict[str, list[Any]]
    """By contestant: a number a round, or several by name."""
    about: dict[str, dict[str, Any]]

    def pick(self, figure: str) -> "Rounds":
        """One of several figures."""
        return Rounds({name: [value[figure] for value in values] for name, values in self.values.items()}, self.about)

    def row(self, case: str, unit: str, peer: str, ours: str = "ours", peer_name: str | None = None) -> dict[str, Any]:
        """One row of the table: medians, their ratio (above 1 where we are better), its range by round."""
        a, b = self.values[ours], self.values[peer]
        smaller = unit in SMALLER_IS_BETTER
        ratios = sorted(y / x if smaller else x / y for x, y in zip(a, b, strict=True))
        ours_median, peer_median = statistics.median(a), statistics.median(b)
        return {
            "case": case,
            "ours": ours_median,
            "peer": peer_median,
            "peer_name": peer_name or peer,
            "unit": unit,
            "ratio": peer_median / ours_median if smaller else ours_median / peer_median,
            "ratio_range": [ratios[0], ratios[-1]],
        }


def run_rounds(contestants: Sequence[Contestant], rounds: int = 7, *, fresh: bool = False) -> Rounds:
    """Measure the contestants in turn, `rounds` times. With `fresh` every figure comes from a new process."""
    values: dict[str, list[Any]] = {contestant.name: [] for contestant in contestants}
    workers: dict[str, Worker] = {}
    about: dict[str, dict[str, Any]] = {}
    try:
        for _ in range(rounds):
            for contestant in contestants:
                worker = workers.pop(contestant.name, None) or Worker(contestant)
                workers[contestant.name] = worker
                about[contestant.name] = worker.about
                values[contestant.name].append(worker.measure())
                if fresh:
                    workers.pop(contestant.name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return Rounds(values, about)


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the quickest of `repeats` runs, after one run to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def matrix_gflops(size: int = 2048) -> dict[str, float]:
    """10^9 operations per second of a square matrix product of this torch, with its default threads."""
    import torch

    figures = {}
    for name in ("float32", "bfloat16", "int8"):
        if name == "int8":
            a = torch.randint(-128, 128, (size, size), dtype=torch.int8)
            seconds = best_of(3, lambda a=a: torch._int_mm(a, a))  # pyright: ignore[reportPrivateImportUsage]
        else:
            a = torch.randn(size, size).to(getattr(torch, name))
            seconds = best_of(3, lambda a=a: a @ a)
        figures[name] = round(2 * size**3 / seconds / 1e9, 1)
    return figures


def memory_gbps(mebibytes: int = 256) -> float:
    """10^9 bytes per second read plus written while copying a block larger than any cache."""
    import torch

    source = torch.ones(mebibytes * 2**20 // 4)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / best_of(3, lambda: target.copy_(source)) / 1e9, 2)


def machine() -> dict[str, Any]:
    """The figures every result file carries, measured now."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "matrix_gflops": matrix_gflops(),
        "memory_gbps": memory_gbps(),
    }


def matrix_rows(peer_python: Path = PEERS_PYTHON, rounds: int = 7) -> list[dict[str, Any]]:
    """Plain matrix products in both environments: how much of a later ratio is the two torch builds alone."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        contestants = [
            Contestant(name, [python, __file__, dtype])
            for name, python in {"ours": OURS_PYTHON, "peer": peer_python}.items()
        ]
        done = run_rounds(contestants, rounds)
        case = f"matrix product {dtype} (ours: torch {done.about['ours']['torch']})"
        rows.append(done.row(case, "GFLOP/s", "peer", peer_name=f"torch {done.about['peer']['torch']}"))
    return rows


def report(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print the table and write `benchmarks/results/NAME.json`; `more` are further entries (versions ...)."""
    print_table(rows)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(rounded(record), indent=2) + "\n")
    print(f"machine: {record['machine']}\nwritten: {path.relative_to(ROOT)}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    header = ("case", "ours", "peer", "peer_name", "unit", "ratio", "by round")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        low, high = row.get("ratio_range", (row["ratio"], row["ratio"]))
        figures = (f"{row['ours']:,.4g}", f"{row['peer']:,.4g}", row["peer_name"], row["unit"])
        lines.append((row["case"], *figures, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def rounded(value: Any) -> Any:
    """Four significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(machine(), indent=2))
    else:
        import torch

        product = torch.randn(2048, 2048).to(getattr(torch, sys.argv[1]))
        answer(lambda: 2 * 2048**3 / best_of(3, lambda: product @ product) / 1e9, torch=torch.__version__)
