"""Words and neighbouring words of a corpus, counted exactly in bounded memory.

A file is read once. Its words become numbers in the order of a dictionary that holds at most `memory` words; when that
is full, it goes to the disk as a run: its words sorted, their counts, and the text as numbers. Merging the sorted runs
gives the counts of all words. Two words cannot be seen together more often than either alone, so only words seen
`min_bigram_count` times take part in the second pass over the numbers; it counts pairs in sorted arrays, by ranges.
Nothing is dropped or estimated on the way, so the result does not depend on how the corpus is cut into files.

A pair never spans the end of a line or a sign that parts phrases, such as a full stop or a bracket.
"""

import heapq
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from diptych import files
from diptych.curate.queries.corpus import file_size, read_documents

_PHRASE_END = re.compile(r"[.,;:!?…()\[\]{}<>\"“”„«»|/\\*=•·–—\n\r\t\v\f\x85\u2028\u2029]+")
_GAP = -1
_RUN = pa.schema([pa.field("word", pa.string()), pa.field("count", pa.int64())])
_OPEN = 256
"""Runs that are merged at once."""
_STREAM = 16_000_000
"""Words of one run's text: 64 MB."""

Split = Callable[[str], list[str]]


class Runs:
    """Sums by word, larger than memory: kept in a dictionary, spilled as sorted files, merged at the end."""

    def __init__(self, folder: Path, memory: int) -> None:
        self.counts: dict[str, int] = {}
        self._folder, self._memory, self._paths = folder, memory, list[Path]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, word: str, count: int) -> None:
        """Add to the sum of a word."""
        self.counts[word] = self.counts.get(word, 0) + count
        if len(self.counts) >= self._memory:
            self._spill()

    def items(self) -> Iterator[tuple[str, int]]:
        """All words in order, with their sums."""
        if self.counts:
            self._spill()
        return merge_runs(self._paths, self._folder / "merged")

    def _spill(self) -> None:
        self._paths.append(self._folder / f"{len(self._paths):06d}.parquet")
        words = sorted(self.counts)
        write_run(self._paths[-1], words, [self.counts[word] for word in words])
        self.counts.clear()


def write_run(path: Path, words: Sequence[str], counts: Sequence[int] | NDArray[np.int64]) -> None:
    """Write sorted words and their counts."""
    table = pa.table([pa.array(words, pa.string()), pa.array(counts, pa.int64())], schema=_RUN)
    pq.write_table(table, path, compression="zstd", row_group_size=65_536)


def merge_runs(paths: Sequence[Path], scratch: Path) -> Iterator[tuple[str, int]]:
    """Words of all runs in order, with the sums of their counts; at most `_OPEN` files are open at once."""
    level = 0
    while len(paths) > _OPEN:
        scratch.mkdir(parents=True, exist_ok=True)
        fewer = []
        for start in range(0, len(paths), _OPEN):
            fewer.append(scratch / f"{level}-{start:06d}.parquet")
            with pq.ParquetWriter(fewer[-1], _RUN, compression="zstd") as writer:
                rows = _merge(paths[start : start + _OPEN])
                while some := list(islice(rows, 65_536)):
                    writer.write_table(pa.table([*map(list, zip(*some, strict=True))], schema=_RUN))
        paths, level = fewer, level + 1
    yield from _merge(paths)


def _merge(paths: Iterable[Path]) -> Iterator[tuple[str, int]]:
    merged = heapq.merge(*(_read_run(path) for path in paths))
    for word, same in groupby(merged, key=itemgetter(0)):
        yield word, sum(count for _, count in same)


def _read_run(path: Path) -> Iterator[tuple[str, int]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(8192):
            yield from zip(batch.column("word").to_pylist(), batch.column("count").to_pylist(), strict=True)


@dataclass(frozen=True, kw_only=True)
class NgramCounts:
    """What was counted."""

    tokens: int
    """Words of the corpus, each time they are seen."""
    distinct: int
    """Different words."""
    words: dict[str, int]
    """Words that were seen often enough, in order, with their counts."""
    bigrams: list[tuple[str, str, int, float]]
    """Neighbours that were seen often enough: first, second, count, pointwise mutual information in bits."""


def count_ngrams(
    places: Sequence[str],
    scratch: Path,
    *,
    split: Split,
    min_word_count: int,
    min_bigram_count: int,
    memory: int,
    processes: int = 0,
) -> NgramCounts:
    """Count a corpus; `scratch` keeps what is read, file by file, so that a second try goes on from there."""
    scratch.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(scratch)
    folders = [scratch / xxhash.xxh3_64_hexdigest(f"{place}\0{file_size(place)}".encode()) for place in places]
    work = [(place, folder, split, memory) for place, folder in zip(places, folders, strict=True)]
    missing = [one for one in work if not one[1].exists()]
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_read_file, *zip(*missing, strict=True)) if missing else ())
    else:
        for one in missing:
            _read_file(*one)
    runs = sorted(path for folder in folders for path in folder.glob("*.parquet"))
    tokens = distinct = 0
    frequent: dict[str, int] = {}
    for word, count in merge_runs(runs, scratch / "merged"):
        tokens, distinct = tokens + count, distinct + 1
        if count >= min(min_word_count, min_bigram_count):
            frequent[word] = count
    bigrams = _count_bigrams(runs, frequent, tokens, min_bigram_count)
    words = {word: count for word, count in frequent.items() if count >= min_word_count}
    return NgramCounts(tokens=tokens, distinct=distinct, words=words, bigrams=bigrams)


def _read_file(place: str, folder: Path, split: Split, memory: int) -> None:
    """Turn one file into runs; the folder appears when all are there."""
    with files.atomic_folder(folder) as temporary:
        numbers: dict[str, int] = {}
        stream = array("i")
        run = 0
        for document in read_documents(place):
            for phrase in _PHRASE_END.split(document):
                words = split(phrase)
                stream.extend([numbers.setdefault(word, len(numbers)) for word in words])
                stream.append(_GAP)
            if len(numbers) >= memory or len(stream) >= _STREAM:
                _write_stream(temporary / f"{run:06d}", numbers, stream)
                numbers, stream, run = {}, array("i"), run + 1
        _write_stream(temporary / f"{run:06d}", numbers, stream)


def _write_stream(path: Path, numbers: dict[str, int], stream: "array[int]") -> None:
    """Write a run: sorted words with counts, and the text as rows of that table."""
    text = np.frombuffer(stream, dtype=np.int32)
    words = sorted(numbers)
    order = np.array([numbers[word] for word in words], dtype=np.int64)
    rank = np.empty(len(words) + 1, dtype=np.int32)
    rank[order] = np.arange(len(words), dtype=np.int32)
    rank[-1] = _GAP  # where -1 points
    counts = np.bincount(text[text >= 0], minlength=len(words))[order]
    write_run(path.with_suffix(".parquet"), words, counts.astype(np.int64))
    np.save(path.with_suffix(".npy"), rank[text])


def _count_bigrams(
    runs: Sequence[Path], frequent: dict[str, int], tokens: int, least: int
) -> list[tuple[str, str, int, float]]:
    words = [word for word, count in frequent.items() if count >= least]
    number = {word: i for i, word in enumerate(words)}
    counts = np.array([frequent[word] for word in words], dtype=np.float64)
    pair_files = [path.with_suffix(".pairs.npy") for path in runs]
    for path, pairs in zip(runs, pair_files, strict=True):
        _write_pairs(path, pairs, number)
    found: list[tuple[str, str, int, float]] = []
    for keys, together in _sum_pairs(pair_files):
        often = together >= least
        keys, together = keys[often], together[often]
        first, second = keys // len(words), keys % len(words)
        information = np.log2(together * float(tokens) / (counts[first] * counts[second]))
        rows = zip(first.tolist(), second.tolist(), together.tolist(), information.tolist(), strict=True)
        found += [(words[a], words[b], count, bits) for a, b, count, bits in rows]
    for path in pair_files:
        path.unlink()
    return found


def _write_pairs(run: Path, out: Path, number: dict[str, int]) -> None:
    """Pairs of frequent neighbours in one run: two rows, sorted keys and counts."""
    known = np.array([number.get(word, _GAP) for word, _ in _read_run(run)] + [_GAP], dtype=np.int64)
    text = known[np.load(run.with_suffix(".npy"))]
    first, second = text[:-1], text[1:]
    both = (first >= 0) & (second >= 0)
    keys, counts = np.unique(first[both] * len(number) + second[both], return_counts=True)
    np.save(out, np.stack([keys, counts]))


def _sum_pairs(paths: Sequence[Path]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Sums over all files, in ranges of keys that hold about `_STREAM` entries each."""
    tables = [np.load(path, mmap_mode="r") for path in paths]
    sample = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *(table[0, ::1024] for table in tables)]))
    borders = [0, *np.unique(sample[_STREAM // 1024 :: _STREAM // 1024]).tolist(), np.iinfo(np.int64).max]
    for low, high in pairwise(borders):
        ranges = [slice(*np.searchsorted(table[0], [low, high])) for table in tables]
        keys = np.concatenate([np.zeros(0, dtype=np.int64), *(t[0, r] for t, r in zip(tables, ranges, strict=True))])
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *(t[1, r] for t, r in zip(tables, ranges, strict=True))])
        unique, place = np.unique(keys, return_inverse=True)
        sums = np.zeros(len(unique), dtype=np.int64)
        np.add.at(sums, place, counts)
        yield unique, sums


def remove_scratch(scratch: Path) -> None:
    """Delete what counting left on the disk."""
    shutil.rmtree(scratch, ignore_errors=True)
