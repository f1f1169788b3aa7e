"""Which queries of a list a text contains, under one of two rules.

`includes` compares words: both sides are NFKC-normalised and casefolded, punctuation separates words, runs of spaces
count as one. Invisible format characters and variation selectors vanish. Characters of scripts written without spaces
(Chinese, Japanese, Thai, Lao, Burmese, Khmer) and symbols such as emoji are a word each, so an entry in such a script
is found anywhere in a text. Entries of which nothing is left match nothing.

`strict_metaclip` follows MetaCLIP to the letter: only the text is spaced, only at , . ; : ? ! and the backtick, case
counts and runs of spaces stay. Entries that hold such a mark can therefore never match.

Both rules end in one search: " entry " inside " text ", all overlaps, each query once.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import ahocorasick_rs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diptych.errors import UsageError

Rule = Literal["includes", "strict_metaclip"]

NO_QUERY = "no_query"
"""The reason of a text that contains none of the queries."""

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")  # first word of a character's name
_METACLIP = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")})


class _Spacing(dict[int, str]):
    """What each character becomes under `includes`; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or 0xFE00 <= code <= 0xFE0F:
            spaced = ""
        elif category[0] in "PZC":
            spaced = " "
        elif category[0] == "S" or unicodedata.name(character, "").split(" ")[0] in _UNSPACED:
            spaced = f" {character} "
        else:
            spaced = character
        self[code] = spaced
        return spaced


_SPACING = _Spacing()


def normalise(text: str) -> str:
    """Words of a text under `includes`, joined by single spaces."""
    if text.isascii():
        folded = text.lower()
    else:  # Unicode's compatibility caseless match: folding may denormalise, normalising may unfold
        folded = unicodedata.normalize("NFD", text).casefold()
        folded = unicodedata.normalize("NFKC", folded).casefold()
        folded = unicodedata.normalize("NFKC", folded)
    return " ".join(folded.translate(_SPACING).split())


def space_metaclip(text: str) -> str:
    """A text as MetaCLIP searches it, with a space on each side."""
    return f" {text} ".translate(_METACLIP)


class Matcher:
    """Finds the queries of one list in texts; the list is held once, as an automaton."""

    def __init__(self, queries: Sequence[str], rule: Rule = "includes") -> None:
        if rule not in ("includes", "strict_metaclip"):
            raise UsageError(f"rule is {rule!r}; allowed: includes, strict_metaclip; choose one of them")
        self._space: Callable[[str], str] = space_metaclip
        if rule == "includes":
            self._space = lambda text: f" {normalise(text)} "
            spaced = [f" {normalise(query)} " for query in queries]
        else:
            spaced = [f" {query} " for query in queries]
        ids: dict[str, list[int]] = {}
        for number, pattern in enumerate(spaced):
            if rule == "strict_metaclip" or pattern != "  ":
                ids.setdefault(pattern, []).append(number)
        self._ids = list(ids.values())
        self._automaton = ahocorasick_rs.AhoCorasick(
            list(ids), implementation=ahocorasick_rs.Implementation.ContiguousNFA, store_patterns=False
        )

    def __call__(self, text: str) -> list[int]:
        """Sorted numbers of the queries that the text contains."""
        hits = self._automaton.find_matches_as_indexes(self._space(text), overlapping=True)
        return sorted({number for hit in hits for number in self._ids[hit[0]]})


@lru_cache(maxsize=2)
def _load_matcher(path: str, rule: Rule) -> Matcher:
    table = pq.read_table(path, columns=["id", "text"]).sort_by("id")
    if table["id"].to_pylist() != list(range(len(table))):
        raise UsageError(f"ids in {path} are not 0, 1, 2, ...; a query list numbers its rows so; write the list again")
    return Matcher(table["text"].to_pylist(), rule)


@dataclass(frozen=True, kw_only=True)
class Match:
    """Stage: adds `queries` to each pair; a pair without any gets the reason `no_query`."""

    queries: str
    """Parquet file with the columns id and text."""
    rule: Rule = "includes"
    """How texts are compared."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Match batch by batch; the automaton is built once per process, at the first batch."""
        for batch in batches:
            matcher = _load_matcher(str(Path(self.queries)), self.rule)
            found = [matcher(caption) for caption in batch.column("caption").to_pylist()]
            reasons = [None if ids else NO_QUERY for ids in found]
            batch = batch.append_column(
                pa.field("queries", pa.list_(pa.int32())), pa.array(found, pa.list_(pa.int32()))
            )
            yield batch.append_column(pa.field("reason", pa.string()), pa.array(reasons, pa.string()))


def count_matches(batches: Iterable[pa.RecordBatch], queries: int) -> NDArray[np.uint64]:
    """Count the pairs of each query; the counts of several tasks add up."""
    counts = np.zeros(queries, dtype=np.uint64)
    for batch in batches:
        ids = batch.column("queries").flatten().to_numpy(zero_copy_only=False)
        counts += np.bincount(ids, minlength=queries).astype(np.uint64)
    return counts
