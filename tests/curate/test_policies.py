"""Balancing: against the slow twin, in any order and partition, and within its bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.balance as slow
from diptych.curate.balance.policies import Matches, hash_keys, match_draws, pair_draws
from reference.balance_plan import build_plan

QUERIES, LIMIT = 300, 20


def make_pairs(count: int = 4000) -> dict[int, list[int]]:
    """Zipf matches, zero to six a pair."""
    random = np.random.default_rng(7)
    sizes = random.integers(0, 7, count)
    return {i: sorted({int(q) % QUERIES for q in random.zipf(1.3, size)}) for i, size in enumerate(sizes)}


def pack(pairs: dict[int, list[int]], names: list[int]) -> Matches:
    offsets = np.cumsum([0] + [len(pairs[name]) for name in names])
    flat = np.array([query for name in names for query in pairs[name]], dtype=np.int64)
    return Matches(keys=hash_keys(map(str, names)), offsets=offsets.astype(np.int64), queries=flat)


def kept(pairs: dict[int, list[int]], policy, parts: int = 1, shuffle: bool = False, limit: int = LIMIT) -> set[int]:
    names = list(pairs)
    if shuffle:
        names = [names[i] for i in np.random.default_rng(3).permutation(len(names))]
    split = [names[i::parts] for i in range(parts)]
    blocks = [pack(pairs, part) for part in split]
    plan = build_plan(lambda: iter(blocks), QUERIES, policy=policy, limit=limit)
    masks = [plan.judge(block).kept for block in blocks]
    return {part[i] for part, mask in zip(split, masks, strict=True) for i in np.flatnonzero(mask)}


@pytest.mark.parametrize("limit", [1, 20, 700])
@pytest.mark.parametrize("policy", ["cap", "assign"])
def test_equals_the_slow_twin(policy, limit):
    pairs = make_pairs()
    draws = dict(zip(pairs, pair_draws(0, hash_keys(map(str, pairs))).tolist(), strict=True))
    twin = slow.cap if policy == "cap" else slow.assign
    assert kept(pairs, policy, limit=limit) == twin(pairs, draws, limit)


@pytest.mark.parametrize("policy", ["cap", "metaclip", "assign"])
def test_partitions_and_order_do_not_matter(policy):
    pairs = make_pairs()
    one = kept(pairs, policy)
    assert 0 < len(one) < len(pairs)
    for parts in (4, 64):
        assert kept(pairs, policy, parts, shuffle=True) == one


def test_cap_never_exceeds_the_limit():
    pairs = make_pairs()
    held = np.bincount([query for pair in kept(pairs, "cap") for query in pairs[pair]])
    assert held.max() <= LIMIT


def test_cap_holds_when_keys_repeat():
    block = Matches(keys=hash_keys(["same"] * 50), offsets=np.arange(51), queries=np.zeros(50, dtype=np.int64))
    plan = build_plan(lambda: iter([block]), 1, policy="cap", limit=20)
    assert plan.judge(block).kept.sum() <= 20


def test_metaclip_keeps_the_expected_share():
    pairs = make_pairs()
    counts = np.bincount([query for held in pairs.values() for query in held], minlength=QUERIES)
    chance = [1 - np.prod([1 - min(1, LIMIT / counts[query]) for query in held]) for held in pairs.values()]
    spread = np.sqrt(sum(p * (1 - p) for p in chance))
    assert abs(len(kept(pairs, "metaclip")) - sum(chance)) < 4 * spread


PAIRS = st.dictionaries(st.integers(0, 2**40), st.sets(st.integers(0, 9), max_size=4).map(sorted), max_size=60)
SETTINGS = {"limit": st.integers(1, 8), "seed": st.integers(-(2**63), 2**64 - 1)}


def judge(pairs: dict[int, list[int]], policy, limit: int, seed: int, parts: int = 1) -> dict[int, tuple]:
    """Pair -> stays, query, draw."""
    names = list(pairs)
    blocks = {i: pack(pairs, names[i::parts]) for i in range(parts)}
    plan = build_plan(lambda: iter(blocks.values()), QUERIES, policy=policy, limit=limit, seed=seed)
    found = {}
    for i, block in blocks.items():
        verdict = plan.judge(block)
        columns = (verdict.kept.tolist(), verdict.query.tolist(), verdict.draw.tolist())
        found |= dict(zip(names[i::parts], zip(*columns, strict=True), strict=True))
    return found


@settings(deadline=None)
@given(pairs=PAIRS, **SETTINGS)
def test_any_pairs_are_judged_as_by_the_slow_twin(pairs, limit, seed):
    draws = dict(zip(pairs, pair_draws(seed, hash_keys(map(str, pairs))).tolist(), strict=True))
    for policy, twin in (("cap", slow.cap), ("assign", slow.assign)):
        assert {name for name, (stays, *_) in judge(pairs, policy, limit, seed).items() if stays} == twin(
            pairs, draws, limit
        )
    by_match = {}
    for name, held in pairs.items():
        by_match |= dict(zip([(name, query) for query in held], match_draws(seed, pack(pairs, [name])), strict=True))
    stay = {name for name, (stays, *_) in judge(pairs, "metaclip", limit, seed).items() if stays}
    assert stay == slow.metaclip(pairs, by_match, limit)


@settings(deadline=None)
@given(pairs=PAIRS, parts=st.integers(1, 9), shuffled=st.randoms(use_true_random=False), **SETTINGS)
def test_any_parts_in_any_order_are_judged_alike(pairs, parts, shuffled, limit, seed):
    names = list(pairs)
    shuffled.shuffle(names)
    for policy in ("cap", "metaclip", "assign"):
        one = judge(pairs, policy, limit, seed)
        assert judge({name: pairs[name] for name in names}, policy, limit, seed, parts) == one


@settings(deadline=None)
@given(pairs=PAIRS, **SETTINGS)
def test_no_query_ever_exceeds_the_limit(pairs, limit, seed):
    for policy in ("cap", "assign"):
        stay = [name for name, (stays, *_) in judge(pairs, policy, limit, seed).items() if stays]
        charged = {name: query for name, (_, query, _) in judge(pairs, policy, limit, seed).items()}
        for query in range(10):
            held = [query in pairs[name] if policy == "cap" else charged[name] == query for name in stay]
            assert sum(held) <= limit


@settings(deadline=None)
@given(pairs=PAIRS, more=PAIRS, **SETTINGS)
def test_more_pairs_change_only_pairs_whose_queries_gain(pairs, more, limit, seed):
    """A pair that shares no query with the new pairs, nor (assign) with pairs that do, is judged as before."""
    more = {name: held for name, held in more.items() if name not in pairs}
    gained = {query for held in more.values() for query in held}
    for policy in ("cap", "metaclip"):
        before, after = judge(pairs, policy, limit, seed), judge(pairs | more, policy, limit, seed)
        for name, held in pairs.items():
            if not gained.intersection(held):
                assert after[name] == before[name]
            elif not after[name][0] and held:
                continue  # a query of it has more pairs now
            elif held:
                assert before[name][0]  # more pairs never bring one back
    spread = {query for held in pairs.values() if gained.intersection(held) for query in held} | gained
    before, after = judge(pairs, "assign", limit, seed), judge(pairs | more, "assign", limit, seed)
    for name, held in pairs.items():
        if not spread.intersection(held):
            assert after[name] == before[name]


@settings(deadline=None)
@given(pairs=PAIRS, limit=st.integers(1, 8))
def test_what_cap_keeps_is_kept_as_well_when_pairs_fill_up_in_order(pairs, limit):
    draws = dict(zip(pairs, pair_draws(0, hash_keys(map(str, pairs))).tolist(), strict=True))
    stay = {name for name, (stays, *_) in judge(pairs, "cap", limit, 0).items() if stays}
    assert stay <= slow.fill(pairs, draws, limit)


@settings(deadline=None)
@given(pairs=PAIRS, limit=st.integers(1, 8))
def test_the_verdict_names_the_query_that_decided(pairs, limit):
    counts = {query: sum(query in held for held in pairs.values()) for query in range(10)}
    for name, (stays, query, draw) in judge(pairs, "cap", limit, 0).items():
        assert (query in pairs[name]) if pairs[name] else (query, stays) == (-1, False)
        assert 0 <= draw < 1
        if pairs[name] and not stays:
            assert counts[query] > limit
