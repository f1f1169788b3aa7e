"""The funnel: how many rows came into each stage, how many left it, and why the others did not; as text and as HTML."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from diptych import files
from diptych.errors import ShardError
from diptych.report.page import render
from diptych.stage import folder as parts
from diptych.stage.folder import Manifest, read_manifest

EXAMPLES = 5
"""Rows that are shown of each reason."""
LOOKED_AT = 20_000
"""Dropped rows of a stage in which examples are looked for."""
COUNTS_FILE = "counts.parquet"
"""What balancing leaves: pairs of each query before and after."""


@dataclass(frozen=True, kw_only=True)
class FunnelStage:
    """One stage of the funnel."""

    name: str
    rows: int
    kept: int
    dropped: dict[str, int]
    """Reason -> rows, the most frequent first."""
    hash: str
    """SHA-256 of the stage's manifest."""


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """All stages in turn."""

    stages: tuple[FunnelStage, ...]

    def __str__(self) -> str:
        rows = [("stage", "rows", "kept", "dropped, by reason")]
        for step in self.stages:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in step.dropped.items())
            rows.append((step.name, f"{step.rows:,}", f"{step.kept:,}", reasons or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {came:>{widths[1]}}  {kept:>{widths[2]}}  {why}" for name, came, kept, why in rows
        )


def read_funnel(folders: Sequence[Path]) -> Funnel:
    """Read the manifests of stages in turn; raises ShardError if one was not made of the one before it."""
    manifests = [read_manifest(folder) for folder in folders]
    for before, after in itertools.pairwise(manifests):
        if after.parent != before.hash:
            raise ShardError(f"{after.stage} was not made of what {before.stage} holds now; run the stages again")
    return Funnel(stages=tuple(_step(manifest) for manifest in manifests))


def _step(manifest: Manifest) -> FunnelStage:
    ranked = sorted(manifest.dropped.items(), key=lambda item: (-item[1], item[0]))
    return FunnelStage(
        name=manifest.stage, rows=manifest.rows, kept=manifest.kept, dropped=dict(ranked), hash=manifest.hash
    )


def write_report(work: Path, funnel: Funnel) -> Path:
    """Write funnel.json and report.html into a work folder; returns the latter."""
    files.write_json(work / "funnel.json", asdict(funnel))
    most = max((step.rows for step in funnel.stages), default=0)
    html = render(
        "funnel.html.j2",
        stages=[_shown(work, step, most) for step in funnel.stages],
        queries=list(_query_tables(work)),
        samples=list(_samples(work / funnel.stages[-2].name)) if len(funnel.stages) > 1 else [],
    )
    files.write_bytes(work / "report.html", html.encode())
    return work / "report.html"


def _shown(work: Path, step: FunnelStage, most: int) -> dict[str, Any]:
    examples = _dropped_examples(work / step.name)
    reasons = [
        {"name": name, "count": count, "share": 100 * count / max(1, step.rows), "examples": examples.get(name, [])}
        for name, count in step.dropped.items()
    ]
    return {
        "name": step.name,
        "rows": step.rows,
        "kept": step.kept,
        "hash": step.hash,
        "rows_width": 100 * step.rows / max(1, most),
        "kept_width": 100 * step.kept / max(1, most),
        "reasons": reasons,
    }


def _dropped_examples(folder: Path) -> dict[str, list[str]]:
    """Reason -> a few texts that were dropped for it."""
    found: dict[str, list[str]] = {}
    looked = 0
    for name in read_manifest(folder).files:
        if not name.startswith("dropped/"):
            continue
        for batch in parts.read_part(folder / name, ["caption", "reason"]):
            for caption, reason in zip(*(batch.column(i).to_pylist() for i in range(2)), strict=True):
                some = found.setdefault(reason, [])
                text = (caption or "")[:160]
                if text and text not in some and len(some) < EXAMPLES:
                    some.append(text)
            looked += batch.num_rows
        if looked > LOOKED_AT:
            break
    return found


def _query_tables(work: Path) -> Iterator[Mapping[str, Any]]:
    """Queries by the number of pairs that they hold, before balancing and under each policy."""
    path = work / "balance" / COUNTS_FILE
    if not path.exists():
        return
    table = pq.read_table(path)
    columns = [name for name in table.schema.names if name not in ("id", "text")]
    for name in columns:
        counts = table[name].to_numpy()
        digits = np.where(counts > 0, np.floor(np.log10(np.maximum(counts, 1))) + 1, 0).astype(int)
        sizes = np.bincount(digits)
        labels = ["0", *(f"{10**i:,} to {10 ** (i + 1) - 1:,}" for i in range(len(sizes) - 1))]
        bars = [
            {"label": label, "count": int(size), "width": 100 * float(np.log1p(size) / np.log1p(sizes.max()))}
            for label, size in zip(labels, sizes, strict=True)
        ]
        top = np.argsort(-counts, kind="stable")[:10]
        queries = [(table["text"][int(i)].as_py(), int(counts[i])) for i in top if counts[i]]
        yield {"name": name, "bars": bars, "top": queries, "pairs": int(counts.sum())}


def _samples(folder: Path) -> Iterator[Mapping[str, str]]:
    """A few texts that stayed, with their pages."""
    for batch in parts.read_rows(folder, ["caption", "page_url"]):
        for row in batch.slice(0, 24).to_pylist():
            yield {"caption": row["caption"], "page": row["page_url"] or ""}
        return
