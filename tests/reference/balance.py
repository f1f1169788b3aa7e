"""The slow twin of `curate/balance.py`: sort every query's draws."""

from collections.abc import Mapping, Sequence


def cap(pairs: Mapping[int, Sequence[int]], draws: Mapping[int, float], limit: int) -> set[int]:
    """Pairs among the `limit` smallest draws of every query they contain (draws are distinct)."""
    holders: dict[int, list[int]] = {}
    for pair, queries in pairs.items():
        for query in queries:
            holders.setdefault(query, []).append(pair)
    best = {query: set(sorted(held, key=lambda pair: draws[pair])[:limit]) for query, held in holders.items()}
    return {pair for pair, queries in pairs.items() if queries and all(pair in best[query] for query in queries)}


def assign(pairs: Mapping[int, Sequence[int]], draws: Mapping[int, float], limit: int) -> set[int]:
    """`cap` after each pair has been charged to its rarest query."""
    counts: dict[int, int] = {}
    for queries in pairs.values():
        for query in queries:
            counts[query] = counts.get(query, 0) + 1
    rarest = {pair: sorted(held, key=lambda query: (counts[query], query))[:1] for pair, held in pairs.items()}
    return cap(rarest, draws, limit)


def metaclip(pairs: Mapping[int, Sequence[int]], draws: Mapping[tuple[int, int], float], limit: int) -> set[int]:
    """Pairs of which one query's own draw is below limit / count."""
    counts: dict[int, int] = {}
    for queries in pairs.values():
        for query in queries:
            counts[query] = counts.get(query, 0) + 1
    chance = {query: limit / max(count, limit) for query, count in counts.items()}
    return {pair for pair, queries in pairs.items() if any(draws[pair, query] < chance[query] for query in queries)}


def fill(pairs: Mapping[int, Sequence[int]], draws: Mapping[int, float], limit: int) -> set[int]:
    """One pair after the other in the order of their draws; each stays if all its queries have room left."""
    held: dict[int, int] = {}
    kept: set[int] = set()
    for pair in sorted(pairs, key=lambda pair: draws[pair]):
        if pairs[pair] and all(held.get(query, 0) < limit for query in pairs[pair]):
            kept.add(pair)
            for query in pairs[pair]:
                held[query] = held.get(query, 0) + 1
    return kept
