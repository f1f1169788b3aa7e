"""Writes the list of queries: the paper's four sources built from raw inputs, and lists that exist already.

    words      seen `min_word_count` times in a corpus (the paper: 100 times in the English Wikipedia)
    bigrams    neighbouring words with much pointwise mutual information
    titles     of articles that are viewed `min_views` times
    wordnet    the first word of each synset
    list       published lists, as they are

Two queries that are the same to the rule `includes` are one; it remembers all its sources. The same inputs give
the same bytes, however a corpus is cut into files.

    queries.parquet   id, text, sources, count, pmi, views; sorted by first source, then text
    queries.tsv       the same to read
    report.json       what each source gave, with thresholds
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.curate.queries.config import QueriesConfig
from diptych.curate.queries.corpus import find_inputs, kind_of
from diptych.curate.queries.lists import clean_title, count_views, read_list, read_wordnet
from diptych.curate.queries.ngrams import count_ngrams, remove_scratch
from diptych.curate.text.words import normalise, split_words
from diptych.errors import UsageError

SOURCES = ("words", "bigrams", "titles", "wordnet", "list")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("sources", pa.list_(pa.string()), nullable=False),
        pa.field("count", pa.int64()),
        pa.field("pmi", pa.float64()),
        pa.field("views", pa.int64()),
    ]
)
"""`count` and `pmi` (bits) are of the corpus, `views` of the articles with this title."""


@dataclass(kw_only=True)
class Query:
    """One entry in the making."""

    text: str
    sources: list[str] = field(default_factory=list)
    count: int | None = None
    pmi: float | None = None
    views: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source gave."""

    found: int = 0
    """Above its thresholds."""
    new: int = 0
    """Queries that no source before this one has."""
    empty: int = 0
    """Left out: nothing remains without punctuation."""
    long: int = 0
    """Left out: too long."""


@dataclass(frozen=True, kw_only=True)
class QueriesReport:
    """What was written, and from what."""

    queries: int
    sources: dict[str, SourceReport]
    thresholds: dict[str, int | float | str]
    inputs: dict[str, list[str]]
    """Names of the files."""
    tokens: int
    """Words of the corpus, each time they are seen."""
    distinct_words: int
    bigrams_by_pmi: dict[str, int]
    """Pairs of neighbours that were seen often enough, by whole bits of information: to choose a threshold by."""
    titles: int
    """Titles with any views."""


class _List:
    """The queries so far, by what `includes` makes of them."""

    def __init__(self, max_characters: int) -> None:
        self.queries: dict[str, Query] = {}
        self.reports: dict[str, SourceReport] = {}
        self._max_characters = max_characters

    def add(self, source: str, found: Iterable[Query]) -> None:
        """Take what a source gives; queries that are there already gain a source."""
        counts = Counter[str]()
        for query in found:
            words = normalise(query.text)
            if not words or len(query.text) > self._max_characters:
                counts["long" if words else "empty"] += 1
                continue
            known = self.queries.setdefault(words, query)
            counts["found"] += 1
            counts["new"] += known is query
            if source not in known.sources:
                known.sources.append(source)
            if known is not query:
                known.count = query.count if known.count is None else known.count
                known.pmi = query.pmi if known.pmi is None else known.pmi
            if query.views is not None and known is not query:
                known.views = (known.views or 0) + query.views
        self.reports[source] = SourceReport(**counts)

    def sorted(self) -> list[Query]:
        """In the order of their ids."""
        return sorted(self.queries.values(), key=lambda query: (SOURCES.index(query.sources[0]), query.text))


def run(config: QueriesConfig) -> QueriesReport:
    """Build the list and write it; what a killed run had counted of a corpus is used again."""
    with files.hold_folder(config.out):
        return _build(config)


def _build(config: QueriesConfig) -> QueriesReport:
    scratch = config.out / "counting"
    queries = _List(config.max_characters)
    inputs = {
        "corpus": find_inputs(config.corpus),
        "pageviews": find_inputs(config.pageviews),
        "wordnet": [config.wordnet] if config.wordnet else [],
        "lists": find_inputs(config.lists),
    }
    for place in inputs["corpus"]:
        kind_of(place)  # now, and not after hours of counting
    ngrams = count_ngrams(
        inputs["corpus"],
        scratch / "words",
        split=split_words,
        min_word_count=config.min_word_count,
        min_bigram_count=config.min_bigram_count,
        memory=config.memory,
        processes=config.processes,
    )
    if inputs["corpus"]:
        queries.add("words", (Query(text=word, count=count) for word, count in ngrams.words.items()))
        pairs = [(f"{a} {b}", count, pmi) for a, b, count, pmi in ngrams.bigrams if pmi >= config.min_pmi]
        queries.add("bigrams", (Query(text=text, count=count, pmi=pmi) for text, count, pmi in pairs))
    titles = 0
    if inputs["pageviews"]:
        views = count_views(
            inputs["pageviews"],
            scratch / "views",
            project=config.project,
            least_a_file=config.min_views_a_file,
            memory=config.memory,
        )
        counted = _Counted(views)
        queries.add("titles", (Query(text=clean_title(t), views=n) for t, n in counted if n >= config.min_views))
        titles = counted.rows
    if config.wordnet:
        queries.add("wordnet", (Query(text=text) for text in sorted(set(read_wordnet(config.wordnet)))))
    if inputs["lists"]:
        listed = set[str]()
        for place in inputs["lists"]:
            of_list = set(filter(None, read_list(place)))
            if not of_list:
                raise UsageError(f"{place} holds no query")
            listed |= of_list
        queries.add("list", (Query(text=text) for text in sorted(listed)))
    report = QueriesReport(
        queries=len(queries.queries),
        sources=queries.reports,
        thresholds={name: value for name, value in vars(config).items() if name.startswith(("min_", "max_"))},
        inputs={name: [PurePosixPath(place).name for place in places] for name, places in inputs.items()},
        tokens=ngrams.tokens,
        distinct_words=ngrams.distinct,
        bigrams_by_pmi=_by_bits(pmi for *_, pmi in ngrams.bigrams),
        titles=titles,
    )
    _write(config, queries.sorted(), report)
    remove_scratch(scratch)
    return report


def format_report(report: QueriesReport) -> str:
    """A table for the screen."""
    lines = [f"{'source':<10}{'found':>12}{'new':>12}{'empty':>8}{'long':>8}"]
    for name, one in report.sources.items():
        lines.append(f"{name:<10}{one.found:>12,}{one.new:>12,}{one.empty:>8,}{one.long:>8,}")
    lines.append(f"{'together':<10}{'':>12}{report.queries:>12,}")
    if report.tokens:
        lines.append(f"{report.tokens:,} words of text, {report.distinct_words:,} different ones")
    if report.bigrams_by_pmi:
        lines.append("bigrams seen often enough, by bits of mutual information:")
        lines += [f"{bits:>8}{count:>12,}" for bits, count in report.bigrams_by_pmi.items()]
    return "\n".join(lines)


class _Counted:
    def __init__(self, items: Iterator[tuple[str, int]]) -> None:
        self.rows, self._items = 0, items

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for item in self._items:
            self.rows += 1
            yield item


def _by_bits(informations: Iterable[float]) -> dict[str, int]:
    counts = Counter(math.floor(bits) for bits in informations)
    return {str(bits): counts[bits] for bits in sorted(counts)}


def _write(config: QueriesConfig, queries: list[Query], report: QueriesReport) -> None:
    rows = [{"id": i, **vars(query)} for i, query in enumerate(queries)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with files.atomic_file(config.out / "queries.tsv") as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(SCHEMA.names) + "\n")
        for i, query in enumerate(queries):
            pmi = "" if query.pmi is None else f"{query.pmi:.3f}"
            numbers = ["" if value is None else str(value) for value in (query.count, query.views)]
            text = " ".join(query.text.split())  # a tab or a line's end would break the table
            file.write(f"{i}\t{text}\t{','.join(query.sources)}\t{numbers[0]}\t{pmi}\t{numbers[1]}\n")
    files.write_json(config.out / "report.json", asdict(report))
    with files.atomic_file(config.out / "queries.parquet") as path:
        pq.write_table(table, path, compression="zstd")
