"""Balancing: against the slow twin, in any order and partition, and within its bounds."""

import numpy as np
import pytest

import reference.balance as slow
from diptych.curate.policies import Matches, build_plan, hash_keys, pair_draws

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
