"""The slow twin of `curate/ngrams.py`: everything in memory, one document after the other."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

PHRASE_END = re.compile(r"[.,;:!?…()\[\]{}<>\"“”„«»|/\\*=•·–—\n\r\t\v\f\x85\u2028\u2029]")


def count_ngrams(
    documents: Iterable[str], split: Callable[[str], list[str]], least_word: int, least_pair: int
) -> tuple[int, dict[str, int], dict[tuple[str, str], tuple[int, float]]]:
    """Tokens, frequent words with counts, frequent neighbours with counts and information."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for document in documents:
        for phrase in PHRASE_END.split(document):
            sequence = split(phrase)
            words.update(sequence)
            pairs.update(pairwise(sequence))
    total = words.total()
    bits = {(a, b): math.log2(n * total / (words[a] * words[b])) for (a, b), n in pairs.items()}
    often = {pair: (count, bits[pair]) for pair, count in pairs.items() if count >= least_pair}
    return total, {word: count for word, count in words.items() if count >= least_word}, often
