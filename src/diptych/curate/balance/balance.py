"""Balances a folder of matched pairs: sums first, each a stage of its own, then one pass that drops pairs.

    work/balance/
      plan/counts, plan/cap-bins, ...   sums, part by part: what the policies of `policies.py` ask of the whole
      part-00000.parquet                the pairs that stay, with `query` and `draw`
      counts.parquet                    per query: pairs before, and after each policy
      balance.json                      the same in short

Every sum is a map over parts whose small results add up, so it runs on any engine, goes on after a kill, and no process
holds more than one block of pairs and a few arrays as long as the list of queries.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from diptych import files
from diptych.curate.balance.config import BalanceConfig, Policy
from diptych.curate.balance.match import queries_file
from diptych.curate.balance.policies import BINS, Common, Matches, Plan, charge, hash_keys
from diptych.curate.rows import BALANCED, read_queries, with_reason
from diptych.errors import ShardError, UsageError
from diptych.stage.folder import Manifest, part_paths, read_manifest, read_rows
from diptych.stage.job import Task
from diptych.stage.run import Engine, StageReport, part_name, tasks_of

POLICIES: tuple[Policy, ...] = ("cap", "metaclip", "assign")
OVER_LIMIT = "over_limit"
"""The reason of a pair that its queries have enough of."""
TALLY = pa.schema([pa.field("place", pa.int64()), pa.field("count", pa.int64())])
DRAWS = pa.schema([pa.field("place", pa.int64()), pa.field("draw", pa.float64())])
BLOCK_ROWS = 65_536
TASKS = 256
"""Tasks of a sum, at most: each leaves up to a row per query, which one process adds up."""

Measure = Callable[[Matches], NDArray[np.int64]]
"""Places of a sum at which a block of pairs counts one each."""


def to_matches(keys: pa.Array, queries: pa.ListArray) -> Matches:
    """View columns of pairs as the policies want them."""
    lengths = queries.value_lengths().to_numpy(zero_copy_only=False)
    flat = queries.flatten().to_numpy(zero_copy_only=False)
    return Matches(
        keys=hash_keys(keys.to_pylist()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        queries=flat.astype(np.int64),
    )


def read_blocks(path: Path, charged_by: str | None = None) -> Iterator[Matches]:
    """Keys and queries of a part; with a file of counts each pair is charged to its rarest query only."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BLOCK_ROWS, columns=["key", "queries"]):
                block = to_matches(batch.column("key"), batch.column("queries"))
                yield block if charged_by is None else charge(block, load_array(charged_by))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path} is damaged ({error}); run the stage that wrote it again") from None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Stage: adds up a measure over the pairs of the parts it is given the paths of."""

    measure: Measure
    size: int
    """Places of the measure."""
    charged_by: str | None = None
    """File of counts, if each pair is to be charged to its rarest query first."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """One row per place whose sum is not zero."""
        total = np.zeros(self.size, dtype=np.int64)
        for path in _paths(batches):
            for block in read_blocks(path, self.charged_by):
                np.add.at(total, self.measure(block), 1)
        places = np.flatnonzero(total)
        yield _rows(TALLY, places, total[places])


@dataclass(frozen=True, kw_only=True)
class CountQueries:
    """Measure: pairs of each query."""

    def __call__(self, block: Matches) -> NDArray[np.int64]:
        """Values for one block."""
        return block.queries


@dataclass(frozen=True, kw_only=True)
class BinDraws:
    """Measure: draws of common queries by row and bin."""

    counts: str
    limit: int
    seed: int

    def common(self) -> Common:
        """The common queries."""
        return load_common(self.counts, self.limit, self.seed)

    def __call__(self, block: Matches) -> NDArray[np.int64]:
        """Values for one block."""
        return self.common().places(block)


@dataclass(frozen=True, kw_only=True)
class CollectDraws:
    """Stage: the draws in the bin of each common query that holds its cutoff."""

    bins: BinDraws
    border: str
    charged_by: str | None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """One row per draw."""
        for path in _paths(batches):
            for block in read_blocks(path, self.charged_by):
                yield _rows(DRAWS, *self.bins.common().collect(block, load_array(self.border)))


@dataclass(frozen=True, kw_only=True)
class CountKept:
    """Measure: pairs of each query that stay, and behind them all pairs that stay."""

    plan: "PlanFiles"

    def __call__(self, block: Matches) -> NDArray[np.int64]:
        """Values for one block."""
        plan = self.plan.load()
        kept = plan.judge(block).kept
        return np.append(block.queries[kept[block.pairs]], np.full(np.count_nonzero(kept), len(plan.counts)))


@dataclass(frozen=True, kw_only=True)
class PlanFiles:
    """A plan as files, so that a stage is small to send."""

    policy: Policy
    limit: int
    seed: int
    counts: str
    cutoffs: str | None

    def load(self) -> Plan:
        """Read it, once a process."""
        cutoffs = np.zeros(0) if self.cutoffs is None else load_array(self.cutoffs)
        counts = load_array(self.counts)
        return Plan(policy=self.policy, limit=self.limit, seed=self.seed, counts=counts, cutoffs=cutoffs)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Stage: adds `query` and `draw` to each pair; one that is too many gets the reason `over_limit`."""

    plan: PlanFiles

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Judge batch by batch."""
        for batch in batches:
            verdict = self.plan.load().judge(to_matches(batch.column("key"), batch.column("queries")))
            reasons = [None if kept else OVER_LIMIT for kept in verdict.kept.tolist()]
            nowhere = verdict.query < 0
            query = pa.array(verdict.query.astype(np.int32), mask=nowhere)
            columns = [*batch.columns, query, pa.array(verdict.draw, mask=nowhere)]
            yield with_reason(pa.RecordBatch.from_arrays(columns, schema=BALANCED), reasons)


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """What a policy keeps."""

    pairs: int
    """Pairs that stay."""
    most: int
    """Pairs of the query that has most."""
    head_before: int
    """Matches of queries that had more than the limit ..."""
    head_after: int
    tail_before: int
    """... and of the others."""
    tail_after: int
    queries_by_pairs: dict[str, int]
    """Queries by the number of pairs they keep: 0, 1-9, 10-99, ..."""


@dataclass(frozen=True, kw_only=True)
class BalanceReport:
    """What balancing did."""

    stage: StageReport
    policy: Policy
    limit: int
    pairs: int
    """Matched pairs before."""
    head_queries: int
    """Queries with more pairs than the limit."""
    queries_by_pairs: dict[str, int]
    """Histogram before balancing."""
    achieved: dict[str, Achieved]
    """By policy; one of them was carried out."""


def run(config: BalanceConfig, *, engine: Engine) -> BalanceReport:
    """Balance a folder of matched pairs; the others of the three policies are only counted."""
    config = replace(config, queries=queries_file(config.queries))
    parent = read_manifest(config.pairs)
    _check_list(config, parent)
    texts = read_queries(config.queries)
    planner = _Planner(config, parent.hash, len(texts), engine)
    counts = planner.counts()
    chosen: list[Policy] = [policy for policy in POLICIES if config.compare or policy == config.policy]
    plans = {policy: planner.plan(policy) for policy in chosen}
    report = engine.run_stage(
        Balance(plan=plans[config.policy]),
        tasks_of(config.pairs),
        config.out,
        config,
        schema=BALANCED,
        parent=parent.hash,
    )
    after = {plan.policy: planner.kept(plan) for plan in plans.values()}
    columns = {policy: pa.array(held[:-1]) for policy, held in after.items()}
    table = pa.table({"id": texts["id"], "text": texts["text"], "before": pa.array(counts), **columns})
    with files.atomic_file(config.out / "counts.parquet") as path:
        pq.write_table(table, path, compression="zstd")
    balanced = BalanceReport(
        stage=report,
        policy=config.policy,
        limit=config.limit,
        pairs=parent.kept,
        head_queries=int(np.count_nonzero(counts > config.limit)),
        queries_by_pairs=_decades(counts),
        achieved={policy: _achieve(counts, held, config.limit) for policy, held in after.items()},
    )
    short = {name: value for name, value in asdict(balanced).items() if name != "stage"}
    files.write_json(config.out / "balance.json", short)
    return balanced


def _check_list(config: BalanceConfig, parent: Manifest) -> None:
    """The pairs name queries by number, so another list would count nonsense; raises UsageError."""
    matched = parent.config.get("queries")
    if isinstance(matched, dict) and matched.get("sha256") != files.sha256(config.queries):
        raise UsageError(
            f"the pairs in {config.pairs} were matched with another list than {config.queries}; name that list, or run "
            "`diptych curate match` with this one"
        )


class _Planner:
    """Asks the engine for the sums that plans are made of; each is kept in a folder of its own."""

    def __init__(self, config: BalanceConfig, parent: str, queries: int, engine: Engine) -> None:
        self._config, self._parent, self._queries, self._engine = config, parent, queries, engine
        self._folder = config.out / "plan"
        paths = part_paths(config.pairs)
        together = -(-len(paths) // TASKS)
        self._tasks = [
            Task(part_name(i), tuple(paths[start : start + together]), rows=False)
            for i, start in enumerate(range(0, len(paths), together))
        ]

    def counts(self) -> NDArray[np.int64]:
        """Pairs of each query."""
        return load_array(self._tally("counts", CountQueries(), self._queries))

    def plan(self, policy: Policy) -> PlanFiles:
        """All that a policy asks of the whole."""
        counts = self._tally("counts", CountQueries(), self._queries)
        cutoffs = None
        if policy == "cap":
            cutoffs = self._cutoffs(policy, counts, None)
        elif policy == "assign":
            charged = self._tally("charged", CountQueries(), self._queries, counts)
            cutoffs = self._cutoffs(policy, charged, counts)
        limit, seed = self._config.limit, self._config.seed
        return PlanFiles(policy=policy, limit=limit, seed=seed, counts=counts, cutoffs=cutoffs)

    def kept(self, plan: PlanFiles) -> NDArray[np.int64]:
        """Pairs of each query that stay, and behind them all that stay."""
        return load_array(self._tally(f"{plan.policy}-kept", CountKept(plan=plan), self._queries + 1))

    def _cutoffs(self, policy: Policy, counts: str, charged_by: str | None) -> str:
        bins = BinDraws(counts=counts, limit=self._config.limit, seed=self._config.seed)
        common = bins.common()
        histogram = load_array(self._tally(f"{policy}-bins", bins, len(common.ids) * BINS, charged_by))
        histogram = histogram.reshape(len(common.ids), BINS)
        border = self._save(f"{policy}-border", common.border(histogram))
        stage = CollectDraws(bins=bins, border=border, charged_by=charged_by)
        rows, draws = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        for batch in self._run(f"{policy}-draws", stage, DRAWS):
            rows.append(batch.column("place").to_numpy())
            draws.append(batch.column("draw").to_numpy())
        return self._save(f"{policy}-cutoffs", common.cutoffs(histogram, np.concatenate(rows), np.concatenate(draws)))

    def _tally(self, name: str, measure: Measure, size: int, charged_by: str | None = None) -> str:
        total = np.zeros(size, dtype=np.int64)
        for batch in self._run(name, Tally(measure=measure, size=size, charged_by=charged_by), TALLY):
            np.add.at(total, batch.column("place").to_numpy(), batch.column("count").to_numpy())
        return self._save(name, total)

    def _run(self, name: str, stage: "Tally | CollectDraws", schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        decides = {"limit": self._config.limit, "seed": self._config.seed, "queries": self._queries}
        folder = self._folder / name
        self._engine.run_stage(stage, self._tasks, folder, decides, schema=schema, parent=self._parent)
        return read_rows(folder)

    def _save(self, name: str, array: NDArray[np.generic]) -> str:
        buffer = io.BytesIO()
        np.save(buffer, array)
        digest = xxhash.xxh3_64_hexdigest(buffer.getvalue())
        path = self._folder / f"{name}.{digest}.npy"  # the name says what is in it, so no process keeps an older one
        if not path.exists():
            files.write_bytes(path, buffer.getvalue())
        return str(path)


def format_report(report: BalanceReport) -> str:
    """A table for the screen."""
    head = f"{report.head_queries:,} queries have more than {report.limit:,} of the {report.pairs:,} pairs"
    lines = [head, f"{'policy':<10}{'pairs':>14}{'most a query':>14}{'head matches kept':>19}{'tail matches kept':>19}"]
    for policy, one in report.achieved.items():
        mark = " *" if policy == report.policy else ""
        shares = [_share(one.head_after, one.head_before), _share(one.tail_after, one.tail_before)]
        lines.append(f"{policy + mark:<10}{one.pairs:>14,}{one.most:>14,}{shares[0]:>19}{shares[1]:>19}")
    names = list(report.queries_by_pairs)
    lines.append(f"{'queries by pairs':<18}" + "".join(f"{name:>12}" for name in names))
    rows = {"before": report.queries_by_pairs} | {name: one.queries_by_pairs for name, one in report.achieved.items()}
    lines += [f"{row:<18}" + "".join(f"{counts.get(name, 0):>12,}" for name in names) for row, counts in rows.items()]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _achieve(before: NDArray[np.int64], after: NDArray[np.int64], limit: int) -> Achieved:
    held, head = after[:-1], before > limit
    return Achieved(
        pairs=int(after[-1]),
        most=int(held.max(initial=0)),
        head_before=int(before[head].sum()),
        head_after=int(held[head].sum()),
        tail_before=int(before[~head].sum()),
        tail_after=int(held[~head].sum()),
        queries_by_pairs=_decades(held),
    )


def _decades(counts: NDArray[np.int64]) -> dict[str, int]:
    digits = np.char.str_len(counts.astype(str)) if len(counts) else np.zeros(0, dtype=np.int64)
    sizes = {"0": int(np.count_nonzero(counts == 0))}
    for length in range(1, int(digits.max(initial=0)) + 1):
        sizes[f"{10 ** (length - 1):,}+"] = int(np.count_nonzero((digits == length) & (counts > 0)))
    return sizes


def _paths(batches: Iterator[pa.RecordBatch]) -> Iterator[Path]:
    for batch in batches:
        yield from map(Path, batch.column("path").to_pylist())


def _rows(schema: pa.Schema, *columns: Sequence[float] | NDArray[np.generic]) -> pa.RecordBatch:
    arrays = [pa.array(column, type) for column, type in zip(columns, schema.types, strict=True)]
    return with_reason(pa.RecordBatch.from_arrays(arrays, schema=schema), [None] * len(arrays[0]))


@lru_cache(maxsize=8)
def load_array(path: str) -> NDArray:
    """Read an array, once a process."""
    return np.load(path, allow_pickle=False)


@lru_cache(maxsize=2)
def load_common(counts: str, limit: int, seed: int) -> Common:
    """Find the common queries, once a process."""
    return Common.build(load_array(counts), limit, seed)
