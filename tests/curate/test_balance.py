"""Balancing folders: the same pairs as the policies choose in memory, whatever the parts, and an honest report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.test_policies import kept, make_pairs
from diptych.curate.balance import balance as balance_room
from diptych.curate.balance import match
from diptych.curate.balance.balance import BalanceReport, format_report, run
from diptych.curate.balance.config import BalanceConfig, MatchConfig
from diptych.curate.rows import BALANCED, CANDIDATES, MATCHED
from diptych.errors import UsageError
from diptych.pair import Pair
from diptych.stage.folder import read_manifest, read_rows
from diptych.stage.run import Engine
from reference.folders import make_stage

QUERIES, LIMIT, PAIRS = 300, 20, 1500


@pytest.fixture(scope="module")
def matches() -> dict[int, list[int]]:
    return {pair: queries for pair, queries in make_pairs(PAIRS).items() if queries}


def balance(folder: Path, matches: dict[int, list[int]], parts: int, policy, **settings) -> BalanceReport:
    queries = folder / "queries.parquet"
    pq.write_table(pa.table({"id": range(QUERIES), "text": [f"query {i}" for i in range(QUERIES)]}), queries)
    names = [list(matches)[i] for i in np.random.default_rng(parts).permutation(len(matches))]
    split = [[Pair(key=str(name), caption=f"text {name}") for name in names[i::parts]] for i in range(parts)]
    pairs = make_stage(folder / "match", split, MATCHED, {str(name): held for name, held in matches.items()})
    config = BalanceConfig(pairs=pairs, queries=queries, out=folder / "balance", policy=policy, limit=LIMIT, **settings)
    return run(config, engine=Engine())


def kept_keys(report: BalanceReport) -> set[int]:
    return {int(key) for batch in read_rows(report.stage.folder) for key in batch.column("key").to_pylist()}


@pytest.mark.parametrize(("policy", "cuts"), [("cap", (1, 4, 64)), ("metaclip", (1, 4)), ("assign", (1, 4))])
def test_folders_of_any_parts_keep_what_the_policy_keeps_in_memory(policy, cuts, matches, tmp_path):
    chosen = kept(matches, policy)
    for parts in cuts:
        folder = tmp_path / str(parts)
        folder.mkdir()
        report = balance(folder, matches, parts, policy, compare=False)
        assert kept_keys(report) == chosen
        assert report.achieved[policy].pairs == report.stage.kept == len(chosen)


def test_report_says_what_each_policy_keeps(matches, tmp_path):
    report = balance(tmp_path, matches, 3, "cap")
    before = np.bincount([query for held in matches.values() for query in held], minlength=QUERIES)
    table = pq.read_table(tmp_path / "balance" / "counts.parquet")
    assert table["before"].to_pylist() == before.tolist()
    for policy in ("cap", "metaclip", "assign"):
        chosen = kept(matches, policy)
        after = np.bincount([query for pair in chosen for query in matches[pair]], minlength=QUERIES)
        one = report.achieved[policy]
        assert table[policy].to_pylist() == after.tolist()
        assert (one.pairs, one.most) == (len(chosen), after.max())
        assert one.head_before + one.tail_before == before.sum()
        assert one.tail_after == after[before <= LIMIT].sum()
        assert sum(one.queries_by_pairs.values()) == QUERIES
        assert one.queries_by_pairs["0"] == np.count_nonzero(after == 0)
    assert json.loads((tmp_path / "balance" / "balance.json").read_text())["achieved"]["cap"]["most"] <= LIMIT
    text = format_report(report)
    assert "cap *" in text
    assert f"{report.achieved['assign'].pairs:,}" in text


def test_rows_say_what_decided(matches, tmp_path):
    report = balance(tmp_path, matches, 2, "assign", compare=False)
    before = np.bincount([query for held in matches.values() for query in held], minlength=QUERIES)
    for batch in read_rows(report.stage.folder):
        assert batch.schema.equals(BALANCED)
        for row in batch.to_pylist():
            assert row["query"] == min(row["queries"], key=lambda query: (before[query], query))
            assert 0 <= row["draw"] < 1
    dropped = pq.read_table(tmp_path / "balance" / "dropped" / "part-00000.parquet")
    assert set(dropped["reason"].to_pylist()) == {"over_limit"}


def test_a_second_run_redoes_nothing_and_other_settings_are_refused(matches, tmp_path):
    report = balance(tmp_path, matches, 2, "cap", compare=False)
    config = BalanceConfig(
        pairs=tmp_path / "match",
        queries=tmp_path / "queries.parquet",
        out=tmp_path / "balance",
        limit=LIMIT,
        compare=False,
    )
    again = run(config, engine=Engine())
    assert (again.stage.found, again.stage.hash) == (2, report.stage.hash)
    other = BalanceConfig(pairs=config.pairs, queries=config.queries, out=config.out, limit=LIMIT + 1)
    with pytest.raises(UsageError, match="other settings"):
        run(other, engine=Engine())
    assert run(other, engine=Engine(redo=True)).limit == LIMIT + 1


def test_sums_of_several_parts_a_task_are_the_same(matches, tmp_path, monkeypatch):
    monkeypatch.setattr(balance_room, "TASKS", 3)
    report = balance(tmp_path, matches, 8, "assign")
    assert len(read_manifest(tmp_path / "balance" / "plan" / "counts").files) == 2 * 3
    assert kept_keys(report) == kept(matches, "assign")
    assert report.achieved["cap"].pairs == len(kept(matches, "cap"))


def test_another_list_than_the_pairs_were_matched_with_is_refused(tmp_path):
    for name, texts in (("a", ["dog", "cat"]), ("b", ["cat", "dog"])):
        pq.write_table(pa.table({"id": pa.array([0, 1], pa.int32()), "text": texts}), tmp_path / f"{name}.parquet")
    pairs = make_stage(tmp_path / "filter", [[Pair(key="1", caption="a dog")]], CANDIDATES)
    match.run(MatchConfig(pairs=pairs, queries=tmp_path / "a.parquet", out=tmp_path / "match"), engine=Engine())
    config = BalanceConfig(pairs=tmp_path / "match", queries=tmp_path / "b.parquet", out=tmp_path / "balance")
    with pytest.raises(UsageError, match="matched with another list"):
        run(config, engine=Engine())
    report = run(dataclasses.replace(config, queries=tmp_path / "a.parquet"), engine=Engine())
    assert report.achieved["cap"].pairs == report.pairs == 1
