"""Matching: the automaton against the slow twin, and the rules by example."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych import files
from diptych.curate.balance.config import MatchConfig
from diptych.curate.balance.match import Match, Matcher, queries_file, run
from diptych.curate.rows import CANDIDATES, MATCHED
from diptych.errors import NotFoundError, UsageError
from diptych.pair import Pair, to_batch
from diptych.stage.folder import read_manifest, read_rows
from diptych.stage.run import Engine
from reference.folders import make_stage
from reference.match_many import RULES, differing

TEXTS = ["dog and cat", "bird", "Dog"]


@pytest.mark.parametrize("rule", RULES)
def test_matcher_equals_the_slow_twin(rule):
    assert differing(4000, 3, rule) == []


def test_a_list_without_queries_finds_nothing():
    assert Matcher([])("a dog") == []
    assert Matcher(["", "..."])("a ... dog") == []
    offsets, numbers = Matcher(["dog"]).find([])
    assert offsets.tolist() == [0]
    assert numbers.tolist() == []


def test_nothing_is_found_across_texts():
    offsets, numbers = Matcher(["hot dog", "dog"]).find(["hot", "dog", "hot dog"] * 1000)
    assert np.diff(offsets).tolist() == [0, 1, 2] * 1000
    assert numbers.tolist() == [1, 0, 1] * 1000


def test_a_long_query_is_found_whole():
    words = [f"w{i % 7}" for i in range(60)]
    matcher = Matcher([" ".join(words), " ".join(words[:-1]), " ".join(words[1:])])
    assert matcher(" ".join(words)) == [0, 1, 2]
    assert matcher(" ".join(words[:-1])) == [1]


def test_includes_treats_both_sides_alike():
    matcher = Matcher(["St. Louis", "hot dog", "straße", "犬", "..."])
    assert matcher("in (st louis)") == [0]
    assert matcher("HOT,  dog/cat STRASSE 小犬 ...") == [1, 2, 3]
    assert matcher("hot dogs") == []


def test_strict_rule_keeps_metaclips_defects():
    matcher = Matcher(["dog", "hot dog", "St. Louis"], "strict_metaclip")
    assert matcher("a dog, here") == [0]
    assert matcher('"dog" (dog) Dog St. Louis') == []
    assert matcher("hot  dog") == [0]
    assert matcher("hot\ndog") == [0, 1]


@pytest.fixture
def queries(tmp_path) -> Path:
    """A list of two."""
    path = tmp_path / "queries" / "queries.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"id": pa.array([1, 0], pa.int32()), "text": ["cat", "dog"]}), path)
    return path


def test_stage_marks_pairs_without_a_query(queries):
    stage = pickle.loads(pickle.dumps(Match(queries=str(queries))))
    (out,) = stage(iter([to_batch([Pair(key=str(i), caption=text) for i, text in enumerate(TEXTS)])]))
    assert out.column("queries").to_pylist() == [[0, 1], [], [0]]
    assert out.column("reason").to_pylist() == [None, "no_query", None]


def test_run_keeps_matched_pairs_and_records_the_list(queries, tmp_path):
    candidates = make_stage(tmp_path / "filter", [[Pair(key=text, caption=text) for text in TEXTS]], CANDIDATES)
    config = MatchConfig(pairs=candidates, queries=queries.parent, out=tmp_path / "match")
    report = run(config, engine=Engine())
    assert (report.rows, report.kept, report.dropped) == (3, 2, {"no_query": 1})
    (rows,) = read_rows(config.out)
    assert rows.schema.equals(MATCHED)
    assert rows.column("queries").to_pylist() == [[0, 1], [0]]
    assert read_manifest(config.out).config["queries"]["sha256"] == files.sha256(queries)
    assert run(config, engine=Engine()).found == 1


def test_a_changed_list_is_read_again(queries):
    batch = to_batch([Pair(key="a", caption="a dog and a bird")])
    (before,) = Match(queries=str(queries))(iter([batch]))
    pq.write_table(pa.table({"id": pa.array([0], pa.int32()), "text": ["bird"]}), queries)
    os.utime(queries, ns=(1, 1))
    (after,) = Match(queries=str(queries))(iter([batch]))
    assert before.column("queries").to_pylist() == after.column("queries").to_pylist() == [[0]]
    assert Match(queries=str(queries)).rule == "includes"
    pq.write_table(pa.table({"id": pa.array([0, 2], pa.int32()), "text": ["bird", "dog"]}), queries)
    with pytest.raises(UsageError, match="not 0, 1, 2"):
        list(Match(queries=str(queries))(iter([batch])))


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="diptych curate queries"):
        queries_file(tmp_path)
