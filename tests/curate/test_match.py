"""Matching: the automaton against the slow twin, and the rules by example."""

import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate.match import Match, Matcher, count_matches
from reference.match import find_queries

PIECES = ["dog", "Dog", "hot", "hot dog", "straße", "STRASSE", "İ", "i̇", "ﬁ", "fi", "犬", "小犬", "🐶", "❤️", "\u200b"]
PIECES += ["é", "e\u0301", " ", "  ", "\t", "\n", ",", ".", "`", "!", "-", "(", "'", "St. Louis", "c++", "สุนัข", "", "a"]


def texts(seed: int, count: int, pieces: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices([*PIECES, " ", " "], k=draw.randint(0, pieces))) for _ in range(count)]


@pytest.mark.parametrize("rule", ["includes", "strict_metaclip"])
def test_matcher_equals_the_slow_twin(rule):
    queries = PIECES + texts(1, 60, 4)
    matcher = Matcher(queries, rule)
    for text in texts(2, 3000, 12):
        assert matcher(text) == find_queries(text, queries, rule), repr(text)


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


def test_stage_marks_pairs_without_a_query_and_counts_add_up(tmp_path):
    path = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"id": pa.array([0, 1], pa.int32()), "text": ["dog", "cat"]}), path)
    stage = pickle.loads(pickle.dumps(Match(queries=str(path))))
    batch = pa.RecordBatch.from_pydict({"caption": ["dog and cat", "bird", "Dog"]})
    (out,) = stage(iter([batch]))
    assert out.column("queries").to_pylist() == [[0, 1], [], [0]]
    assert out.column("reason").to_pylist() == [None, "no_query", None]
    assert count_matches([out], 2).tolist() == [2, 1]
    assert np.array_equal(
        count_matches([out.slice(0, 1)], 2) + count_matches([out.slice(1)], 2), count_matches([out], 2)
    )
