"""A slow, plain twin of `diptych.tokenizer`: strings instead of ids, rounds instead of a heap, no cache."""

import functools
import html
from collections import Counter
from itertools import pairwise

import ftfy
import regex

PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIALS = ("<start_of_text>", "<end_of_text>")
PRINTS = [byte for byte in range(256) if 33 <= byte <= 126 or (byte >= 161 and byte != 173)]
OTHERS = [byte for byte in range(256) if byte not in PRINTS]
LETTER = {byte: chr(byte) for byte in PRINTS} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
SINGLES = [LETTER[byte] for byte in PRINTS + OTHERS]


def split(text: str, special_tokens: str = "escape") -> list[str]:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = " ".join(text.split()).lower()
    pattern = PIECE if special_tokens == "escape" else "|".join([*SPECIALS, PIECE])
    return regex.findall(pattern, text, regex.IGNORECASE)


def spell(piece: str) -> list[str]:
    letters = [LETTER[byte] for byte in piece.encode("utf-8")]
    return [*letters[:-1], letters[-1] + "</w>"]


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    rest = list(word)
    while rest:
        size = 2 if tuple(rest[:2]) == pair else 1
        merged.append("".join(rest[:size]))
        rest = rest[size:]
    return merged


@functools.cache
def tables(merges: tuple[str, ...]) -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    pairs = [tuple(line.split(" ")) for line in merges]
    tokens = [
        *SINGLES,
        *(letter + "</w>" for letter in SINGLES),
        *("".join(pair) for pair in pairs),
        *SPECIALS,
    ]
    return {token: i for i, token in enumerate(tokens)}, {pair: i for i, pair in enumerate(pairs)}


def encode(text: str, merges: tuple[str, ...], special_tokens: str = "escape") -> list[int]:
    vocabulary, rank = tables(merges)
    ids: list[int] = []
    for piece in split(text, special_tokens):
        word = [piece] if piece in SPECIALS else spell(piece)
        while known := [pair for pair in pairwise(word) if pair in rank]:
            word = merge(word, min(known, key=lambda pair: rank[pair]))
        ids += [vocabulary[token] for token in word]
    return ids


def train(captions: list[str], wanted: int) -> list[str]:
    """The `wanted` best merges, all pairs counted anew for each; ties go to the lower ids."""
    words = Counter(tuple(spell(piece)) for caption in captions for piece in split(caption))
    tokens = [*SINGLES, *(letter + "</w>" for letter in SINGLES)]
    merges: list[str] = []
    while len(merges) < wanted:
        counts: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        fresh = [pair for pair in counts if "".join(pair) not in tokens]
        best = min(fresh, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        tokens.append("".join(best))
        merges.append(" ".join(best))
        replaced: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            replaced[tuple(merge(list(word), best))] += count
        words = replaced
    return merges
