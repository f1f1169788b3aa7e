"""Queries found in texts: texts per second on one core, against pyahocorasick and MetaCLIP's loop over all entries.

    .venv/bin/python benchmarks/match.py            (make bench NAME=match)

500,000 queries (half words, half runs of two or three words) and 200,000 texts of Zipf words, all from a seed. The
text is plain lower case, so that every contestant finds the same; their sums of matches are compared. MetaCLIP's
loop tests each entry with `in`; it gets a few texts only.
"""

# pyright: reportMissingImports=false

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness

QUERIES, TEXTS, LOOP_TEXTS = 500_000, 200_000, 5
NAMES = {"ours": TEXTS, "pyahocorasick": TEXTS, "loop": LOOP_TEXTS}
Count = Callable[[list[str]], int]
"""Matches in all of some texts."""


def build_inputs(seed: int = 0) -> tuple[list[str], list[str]]:
    """Queries and texts."""
    rng = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    words = list(dict.fromkeys("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(400_000)))
    words = words[: QUERIES // 2]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    drawn = rng.choices(words, weights, k=3 * QUERIES)
    runs = [" ".join(drawn[i : i + 2 + i % 2]) for i in range(0, len(drawn) - 3, 2)]
    queries = list(dict.fromkeys(words + runs))[:QUERIES]
    stream = iter(rng.choices(words, weights, k=TEXTS * 12))
    return queries, [" ".join(next(stream) for _ in range(12)) for _ in range(TEXTS)]


def build_ours(queries: list[str]) -> Count:
    from diptych.curate.balance.match import Matcher

    matcher = Matcher(queries)
    return lambda texts: len(matcher.find(texts)[1])


def build_pyahocorasick(queries: list[str]) -> Count:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, query in enumerate(queries):
        automaton.add_word(f" {query} ", number)
    automaton.make_automaton()
    return lambda texts: sum(len({number for _, number in automaton.iter(f" {text} ")}) for text in texts)


def build_loop(queries: list[str]) -> Count:
    entries = [f" {query} " for query in queries]

    def count(texts: list[str]) -> int:
        return sum(entry in f" {text} " for text in texts for entry in entries)

    return count


BUILDERS = {"ours": build_ours, "pyahocorasick": build_pyahocorasick, "loop": build_loop}


def work(name: str, inputs: Path) -> None:
    """One contestant in a process of its own."""
    queries, texts = json.loads(inputs.read_text())
    count = BUILDERS[name](queries)
    del queries
    check = count(texts[:LOOP_TEXTS])

    def measure() -> float:
        chosen = texts[: NAMES[name]]
        started = time.perf_counter()
        count(chosen)
        return len(chosen) / (time.perf_counter() - started)

    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    harness.answer(measure, check=check, peak_mib=int(peak.split()[1]) // 1024)


def main() -> None:
    harness.require_peers()
    core = harness.one_core()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.json"
        inputs.write_text(json.dumps(build_inputs()))
        pythons = {"ours": harness.OURS_PYTHON, "pyahocorasick": harness.PEERS_PYTHON, "loop": harness.OURS_PYTHON}
        contestants = [
            harness.Contestant(name, [python, __file__, name, inputs], harness.ONE_THREAD, core)
            for name, python in pythons.items()
        ]
        done = harness.run_rounds(contestants, 3)
    if len({about["check"] for about in done.about.values()}) != 1:
        sys.exit(f"the contestants find different numbers of matches: {done.about}")
    case = "500,000 queries in Zipf texts"
    rows = [
        done.row(case, "texts/s", "pyahocorasick"),
        done.row(case, "texts/s", "loop", peer_name="MetaCLIP's loop over entries"),
    ]
    harness.report("match", rows, about=done.about)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
