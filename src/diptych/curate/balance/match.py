"""Which queries of a list a text contains, under one of two rules.

`includes` compares words: both sides are NFKC-normalised and casefolded, punctuation separates words, runs of spaces
count as one. Invisible format characters and variation selectors vanish. Characters of scripts written without spaces
(Chinese, Japanese, Thai, Lao, Burmese, Khmer) and symbols such as emoji are a word each, so an entry in such a script
is found anywhere in a text. Entries of which nothing is left match nothing.

`strict_metaclip` follows MetaCLIP to the letter: only the text is spaced, only at , . ; : ? ! and the backtick, case
counts and runs of spaces stay. Entries that hold such a mark can therefore never match.

Both rules end in one search: the entry's words as a run of the text's words, all overlaps, each query once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diptych.curate.balance.config import MatchConfig, Rule
from diptych.curate.balance.trie import UNKNOWN, WordTrie
from diptych.curate.rows import MATCHED, read_queries, with_reason
from diptych.curate.text.words import split_metaclip, split_words
from diptych.errors import NotFoundError, UsageError
from diptych.stage.folder import read_manifest
from diptych.stage.run import Engine, StageReport, tasks_of

NO_QUERY = "no_query"
"""The reason of a text that contains none of the queries."""

_TEXTS_AT_ONCE = 2048  # their words fit a cache
_END = " "  # stands behind each text's words; no word holds a space


class Matcher:
    """Finds the queries of one list in texts; the list is held once, as a trie of words."""

    def __init__(self, queries: Sequence[str], rule: Rule = "includes") -> None:
        if rule == "includes":
            self._split = split_words
            self._trie = WordTrie(map(split_words, queries))
        elif rule == "strict_metaclip":  # the text is spaced, its entries are not
            self._split = split_metaclip
            self._trie = WordTrie(query.split(" ") for query in queries)
        else:
            raise UsageError(f"rule is {rule!r}; allowed: includes, strict_metaclip; choose one of them")

    def __call__(self, text: str) -> list[int]:
        """Sorted numbers of the queries that the text contains."""
        return self.find([text])[1].tolist()

    def find(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Sorted numbers of the queries of text i: `numbers[offsets[i]:offsets[i + 1]]`; returns (offsets, numbers)."""
        offsets, numbers = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            sizes, found = self._find_some(texts[start : start + _TEXTS_AT_ONCE])
            offsets.append(offsets[-1][-1] + np.cumsum(sizes))
            numbers.append(found)
        return np.concatenate(offsets).astype(np.int32), np.concatenate(numbers).astype(np.int32)

    def _find_some(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        words = list(map(self._split, texts))
        for text in words:
            text.append(_END)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        stream = map(self._trie.words.get, chain.from_iterable(words), repeat(UNKNOWN))
        places, numbers = self._trie.find(np.fromiter(stream, np.int64, int(lengths.sum())))
        text = np.repeat(np.arange(len(words)), lengths)[places]
        found = np.unique(text * self._trie.sequences + numbers)
        sizes = np.bincount(found // max(1, self._trie.sequences), minlength=len(words))
        return sizes, found % max(1, self._trie.sequences)


def queries_file(path: Path) -> Path:
    """The list of queries that a user means by a file or by the folder that `diptych curate queries` wrote."""
    file = path / "queries.parquet" if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"no list of queries at {file}; `diptych curate queries` writes one")
    return file


@lru_cache(maxsize=2)
def _load_matcher(path: str, changed: int, rule: Rule) -> Matcher:  # noqa: ARG001 (a new file is a new matcher)
    return Matcher(read_queries(Path(path))["text"].to_pylist(), rule)


@dataclass(frozen=True, kw_only=True)
class Match:
    """Stage: adds `queries` to each pair; a pair without any gets the reason `no_query`."""

    queries: str
    """Parquet file with the columns id and text."""
    rule: Rule = "includes"
    """How texts are compared."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Match batch by batch; the list is read once per process, at the first batch."""
        for batch in batches:
            matcher = _load_matcher(self.queries, Path(self.queries).stat().st_mtime_ns, self.rule)
            offsets, numbers = matcher.find(batch.column("caption").to_pylist())
            queries = pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers))
            batch = batch.append_column(MATCHED.field("queries"), queries)
            yield with_reason(batch, [None if size else NO_QUERY for size in np.diff(offsets).tolist()])


def run(config: MatchConfig, *, engine: Engine) -> StageReport:
    """Match a folder of candidates."""
    config = replace(config, queries=queries_file(config.queries))
    stage = Match(queries=str(config.queries), rule=config.rule)
    parent = read_manifest(config.pairs).hash
    return engine.run_stage(stage, tasks_of(config.pairs), config.out, config, schema=MATCHED, parent=parent)
