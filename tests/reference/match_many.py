"""Compare the matcher with its slow twin on many texts made to confuse it.

    PYTHONPATH=src:tests python -m reference.match_many 200000

Texts and queries are drawn from the same few pieces: words that are parts of each other, letters that fold to several,
characters that compose, vanish or stand alone, every blank and every mark that a rule treats apart.
"""

import random
import sys

from diptych.curate.balance.match import Matcher
from reference.match import find_queries

PIECES = ["dog", "Dog", "hot", "hot dog", "straße", "STRASSE", "İ", "i̇", "ﬁ", "fi", "犬", "小犬", "🐶", "❤️", "\u200b"]
PIECES += ["é", "e\u0301", " ", "  ", "\t", "\n", ",", ".", "`", "!", "-", "(", "'", "St. Louis", "c++", "สุนัข", "", "a"]
PIECES += [
    "\0",
    "\x1f",
    "\u00a0",
    "\u0345",
    "ͺ",
    "ſ",
    "K",
    "Å",
    "ｄｏｇ",
    "①",
    "\ufdfa",
    "\ud800",
    "a a a",
    "ΟΔΟΣ",
    "ς",
]
RULES = ("includes", "strict_metaclip")


def draw_texts(seed: int, count: int, pieces: int) -> list[str]:
    """Texts of up to `pieces` pieces, blanks among them twice as often."""
    draw = random.Random(seed)
    return ["".join(draw.choices([*PIECES, " ", " "], k=draw.randint(0, pieces))) for _ in range(count)]


def draw_queries() -> list[str]:
    """The pieces and runs of a few of them; some twice."""
    return PIECES + draw_texts(1, 60, 4) + PIECES[:5]


def differing(count: int, seed: int, rule: str) -> list[str]:
    """Texts in which matcher and twin find different queries."""
    queries = draw_queries()
    texts = draw_texts(seed, count, 12)
    offsets, numbers = Matcher(queries, rule).find(texts)  # pyright: ignore[reportArgumentType]
    found = [numbers[offsets[i] : offsets[i + 1]].tolist() for i in range(count)]
    return [text for text, ours in zip(texts, found, strict=True) if ours != find_queries(text, queries, rule)]


def main() -> None:
    count = int(sys.argv[1])
    for rule in RULES:
        wrong = differing(count, 2, rule)
        print(f"{rule}: {count} texts, {len(wrong)} differ {[*map(ascii, wrong[:3])]}")
        if wrong:
            sys.exit(1)


if __name__ == "__main__":
    main()
