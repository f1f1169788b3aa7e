"""The slow twins of `curate/text/dedup.py`.

`similarity` compares two texts by the pieces themselves; `judge` joins signed rows and walks what is joined.
"""

from collections import defaultdict

from diptych.curate.text.words import normalise


def pieces(text: str) -> set[str]:
    plain = f" {normalise(text)} "
    return {plain[i : i + 3] for i in range(len(plain) - 2)}


def similarity(a: str, b: str) -> float:
    first, second = pieces(a), pieces(b)
    return len(first & second) / len(first | second)


def judge(rows: list[dict], least: float) -> list[int]:
    """Rows of SIGNED -> 0 stays, 1 is a duplicate, 2 a near duplicate."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["rank"])
    verdicts, keys = [1] * len(rows), set()
    for i in order:
        if rows[i]["key"] not in keys:
            keys.add(rows[i]["key"])
            verdicts[i] = 0
    alive = [i for i in order if verdicts[i] == 0]
    holders = defaultdict(list)
    for i in alive:
        for band in rows[i]["bands"]:
            holders[band].append(i)
    joined = defaultdict(set)
    for first, *rest in holders.values():
        for other in rest:
            a, b = rows[first]["signature"], rows[other]["signature"]
            if sum(x == y for x, y in zip(a, b, strict=True)) >= least * len(a):
                joined[first].add(other)
                joined[other].add(first)
    seen: set[int] = set()
    for i in alive:  # the first of its group to be met stays
        if i in seen:
            continue
        todo = [i]
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                verdicts[one] = 0 if one == i else 2
                todo += joined[one]
    return verdicts
