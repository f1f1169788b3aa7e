"""Matching: the automaton against the slow twin, and the rules by example."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.curate.match import Match, Matcher, count_matches
from reference.match_many import RULES, differing


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
