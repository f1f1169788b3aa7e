"""The trie of words: against a search by hand, and when its hash table is crowded."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate.balance.trie import UNKNOWN, Edges, WordTrie

WORDS = st.lists(st.sampled_from("abc"), max_size=5)


@settings(deadline=None)
@given(sequences=st.lists(WORDS, max_size=12), stream=st.lists(st.sampled_from("abcx|"), max_size=30))
def test_finds_what_a_search_by_hand_finds(sequences, stream):
    trie = WordTrie(sequences)
    words = np.array([trie.words.get(word, UNKNOWN) for word in [*stream, "|"]], dtype=np.int64)
    places, numbers = trie.find(words)
    by_hand = {
        (place, number)
        for number, sequence in enumerate(sequences)
        for place in range(len(stream))
        if sequence and stream[place : place + len(sequence)] == sequence
    }
    assert len(places) == len(by_hand)
    assert set(zip(places.tolist(), numbers.tolist(), strict=True)) == by_hand


@settings(deadline=None)
@given(keys=st.sets(st.integers(0, 2**62), max_size=200), absent=st.sets(st.integers(0, 2**62), max_size=200))
def test_table_gives_every_key_its_value_and_no_other(keys, absent):
    stored = np.array(sorted(keys), dtype=np.int64)
    edges = Edges(stored, np.arange(len(stored), dtype=np.int32))
    asked = np.array(sorted(keys | absent), dtype=np.int64)
    places, values = edges.find(asked)
    assert asked[places].tolist() == stored.tolist()
    assert values.tolist() == list(range(len(stored)))


def test_keys_that_share_a_slot_are_told_apart():
    keys = np.arange(0, 2**40, 2**33, dtype=np.int64) * 2**20
    edges = Edges(keys, np.arange(len(keys), dtype=np.int32))
    places, values = edges.find(keys)
    assert places.tolist() == values.tolist() == list(range(len(keys)))
