"""Balancing 1 to 10 million pairs: processor time and memory of the policies, on folders as the pipeline has them.

    .venv/bin/python benchmarks/balance.py          (make bench NAME=balance)

Pairs are made up: 3.5 queries each out of 500,000, with Zipf frequencies (exponent 1.2) that leave 9 % of all
matches to queries below the limit, near the 6 % of the pool MetaCLIP describes; the limit is that pool's, 20,000 for
1.6 billion pairs, in proportion. Each figure is the processor time of one process that balances such a folder, input
and output included; a line through the origin is fitted. Writes docs/balance.svg. No peer does this.

    .venv/bin/python benchmarks/balance.py fill     one million pairs: `cap` beside filling up in order
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

import harness
from diptych.curate.balance.balance import run, to_matches
from diptych.curate.balance.config import BalanceConfig, Policy
from diptych.curate.balance.policies import Matches, pair_draws
from diptych.curate.rows import MATCHED, with_reason
from diptych.stage.job import Task
from diptych.stage.run import Engine, part_name

sys.path.insert(0, str(harness.ROOT / "tests"))
from reference.balance_plan import build_plan  # pyright: ignore[reportMissingImports]

QUERIES, EXPONENT, PART = 500_000, 1.2, 500_000
SIZES = (1_000_000, 2_000_000, 5_000_000, 10_000_000)
POOL, POOL_LIMIT = 1_600_000_000, 20_000
BATCH = 50_000


@dataclass(frozen=True)
class Synthetic:
    """Stage: makes up the matched pairs of the parts whose numbers it is given."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        shares = zipf_shares()
        for part in (int(path) for batch in batches for path in batch.column("path").to_pylist()):
            for first in range(part * PART, (part + 1) * PART, BATCH):
                yield with_reason(make_pairs(first, shares), [None] * BATCH)


def zipf_shares() -> np.ndarray:
    """Sums of the queries' shares of all matches, up to 1."""
    shares = np.cumsum(np.arange(1, QUERIES + 1) ** -EXPONENT)
    return shares / shares[-1]


def make_pairs(first: int, shares: np.ndarray) -> pa.RecordBatch:
    """BATCH pairs from a number on."""
    random = np.random.default_rng(first)
    pair = np.repeat(np.arange(BATCH), 1 + random.poisson(2.5, BATCH))
    drawn = np.unique(pair * QUERIES + np.searchsorted(shares, random.random(len(pair))))
    offsets = np.searchsorted(drawn // QUERIES, np.arange(BATCH + 1)).astype(np.int32)
    queries = pa.ListArray.from_arrays(pa.array(offsets), pa.array((drawn % QUERIES).astype(np.int32)))
    keys = [xxhash.xxh3_128_hexdigest(number.to_bytes(8)) for number in range(first, first + BATCH)]
    nothing = pa.nulls(BATCH)
    details = pa.array(["{}"] * BATCH, MATCHED.field("details").type)
    columns = [pa.array(keys), pa.array(keys), nothing.cast(pa.binary()), nothing.cast(pa.string())]
    columns += [nothing.cast(pa.string()), details, queries]
    return pa.RecordBatch.from_arrays(columns, schema=MATCHED)


def make_folder(folder: Path, pairs: int) -> Path:
    """Write them."""
    tasks = [Task(part_name(i), (str(i),), rows=False) for i in range(pairs // PART)]
    Engine(processes=2).run_stage(Synthetic(), tasks, folder / "match", {}, schema=MATCHED)
    pq.write_table(
        pa.table({"id": range(QUERIES), "text": [f"q{i}" for i in range(QUERIES)]}), folder / "queries.parquet"
    )
    return folder


def work(folder: Path, pairs: int, policy: Policy, compare: bool) -> None:
    """Balance in this process and say what it took."""
    config = BalanceConfig(
        pairs=folder / "match",
        queries=folder / "queries.parquet",
        out=folder / f"{policy}-{compare}",
        policy=policy,
        limit=pairs * POOL_LIMIT // POOL,
        compare=compare,
    )
    wall, processor = time.perf_counter(), time.process_time()
    report = run(config, engine=Engine())
    seconds = time.process_time() - processor, time.perf_counter() - wall
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    one = report.achieved[policy]
    assert policy != "cap" or one.most <= config.limit
    print(
        json.dumps(
            {
                "pairs": report.pairs,
                "policy": policy,
                "limit": config.limit,
                "processor_s": round(seconds[0], 1),
                "wall_s": round(seconds[1], 1),
                "peak_mib": int(peak.split()[1]) // 1024,
                "head_queries": report.head_queries,
                "kept": {name: done.pairs for name, done in report.achieved.items()},
                "tail_before": one.tail_before / (one.tail_before + one.head_before),
                "tail_kept": {n: round(d.tail_after / d.tail_before, 4) for n, d in report.achieved.items()},
                "most": {name: done.most for name, done in report.achieved.items()},
            }
        )
    )


def compare_with_filling(pairs: int = 1_000_000) -> None:
    """Print what `cap` keeps, and what stays if pairs come in the order of their draws while all queries have room."""
    shares = zipf_shares()
    batches = (make_pairs(first, shares) for first in range(0, pairs, BATCH))
    blocks = [to_matches(batch.column("key"), batch.column("queries")) for batch in batches]
    for limit in (pairs * POOL_LIMIT // POOL, 200):
        plan = build_plan(lambda: iter(blocks), QUERIES, policy="cap", limit=limit)
        rare = plan.counts <= limit
        room = [limit] * QUERIES
        drawn = [
            (draw, held) for block in blocks for draw, held in zip(pair_draws(0, block.keys), split(block), strict=True)
        ]
        filled: list[int] = []
        for _, held in sorted(drawn):
            if all(room[query] for query in held):
                filled += held
                for query in held:
                    room[query] -= 1
        kept = [block.queries[plan.judge(block).kept[block.pairs]] for block in blocks]
        free = [np.array(held) for _, held in drawn if rare[held].all()]
        for name, queries in (("cap", np.concatenate(kept)), ("filled in order", np.array(filled))):
            share = np.count_nonzero(rare[queries]) / plan.counts[rare].sum()
            print(f"limit {limit}, {name}: {len(queries):,} matches, {share:.1%} of those of rare queries")
        share = len(np.concatenate(free)) / plan.counts[rare].sum()
        print(f"limit {limit}: {share:.1%} of the matches of rare queries are in pairs without a common query")


def split(block: Matches) -> list[list[int]]:
    """Queries of each pair."""
    return [part.tolist() for part in np.split(block.queries, block.offsets[1:-1])]


def plot(rows: list[dict], path: Path) -> None:
    """Processor time against pairs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diptych"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for policy in ("cap", "metaclip", "assign"):
        x, y = zip(*[(row["pairs"] / 1e6, row["processor_s"]) for row in rows if row["policy"] == policy], strict=True)
        slope = float(np.dot(x, y) / np.dot(x, x))
        (line,) = axes.plot(x, y, "o", label=f"{policy}: {slope:.1f} s a million pairs")
        axes.plot([0, max(x)], [0, slope * max(x)], "-", color=line.get_color(), linewidth=1)
    axes.set(xlabel="matched pairs, millions", ylabel="processor time, s", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or SIZES
    rows: list[dict] = []
    for pairs in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = make_folder(Path(place), pairs)
            for policy, compare in (("cap", 0), ("metaclip", 0), ("assign", 0)):
                command = [sys.executable, __file__, "work", folder, str(pairs), policy, str(compare)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout))
                print(rows[-1], flush=True)
    if tuple(sizes) == SIZES:
        plot(rows, harness.ROOT / "docs" / "balance.svg")
        harness.report("balance", [], about={"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:] == ["fill"]:
        compare_with_filling()
    elif sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1")  # pyright: ignore[reportArgumentType]
    else:
        main()
