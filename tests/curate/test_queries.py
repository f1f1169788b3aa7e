"""The list of queries: four sources in one, each with its numbers, the same bytes however the corpus is cut."""

import gzip
import json
import math

import pyarrow.parquet as pq
import pytest

from curate.test_lists import make_wordnet
from diptych.curate.balance.match import Matcher
from diptych.curate.queries.build import format_report, run
from diptych.curate.queries.config import QueriesConfig
from diptych.errors import UsageError

LINES = ["a hot dog in New York", "the hot dog", "New York, the city", "a cat in the city", "hot dog; a", "the the the"]
VIEWS = "en New_York_(state) 50 0\nen New_York_(city) 60 0\nen Hot_dog 3 0\nen iPhone 70 0\nen ... 99 0\n"


def build(folder, files: int = 1, **settings):
    folder.mkdir()
    for i in range(files):
        (folder / f"{i}.txt").write_text("\n".join(LINES[i::files]))
    (folder / "views.gz").write_bytes(gzip.compress(VIEWS.encode()))
    (folder / "list.json").write_text(json.dumps(["Hot Dog", "!", "", "x" * 300, "St. Louis"]))
    config = {
        "corpus": (str(folder / "*.txt"),),
        "pageviews": (str(folder / "views.gz"),),
        "wordnet": make_wordnet(folder, ".zip"),
        "lists": (str(folder / "list.json"),),
        "min_word_count": 3,
        "min_bigram_count": 2,
        "min_pmi": 2.0,
        "min_views": 50,
    }
    return run(QueriesConfig(out=folder / "out", **(config | settings)))


def rows(folder) -> dict[str, dict]:
    return {row["text"]: row for row in pq.read_table(folder / "out" / "queries.parquet").to_pylist()}


def test_each_query_has_its_sources_and_numbers(tmp_path):
    report = build(tmp_path / "a")
    found = rows(tmp_path / "a")
    assert [row["id"] for row in found.values()] == list(range(report.queries))
    by_source = {name: [text for text, row in found.items() if row["sources"][0] == name] for name in report.sources}
    assert by_source == {
        "words": ["a", "dog", "hot", "the"],
        "bigrams": ["hot dog", "new york", "the city"],
        "titles": ["iPhone"],
        "wordnet": ["entity", "galore"],
        "list": ["St. Louis"],
    }
    assert found["hot dog"]["sources"] == ["bigrams", "wordnet", "list"]
    assert found["hot dog"]["count"] == 3
    assert found["hot dog"]["pmi"] == pytest.approx(math.log2(3 * report.tokens / (3 * 3)))
    assert found["new york"]["sources"] == ["bigrams", "titles"]
    assert found["new york"]["views"] == 110
    assert found["the"] == {"id": 3, "text": "the", "sources": ["words"], "count": 6, "pmi": None, "views": None}


def test_report_says_what_each_source_gave(tmp_path):
    report = build(tmp_path / "a")
    assert (report.sources["titles"].found, report.sources["titles"].new, report.sources["titles"].empty) == (3, 1, 1)
    assert (report.sources["list"].found, report.sources["list"].empty, report.sources["list"].long) == (2, 1, 1)
    assert report.tokens == sum(len(line.replace(",", " ").split()) for line in LINES)
    assert report.titles == 4 + 1
    saved = json.loads((tmp_path / "a" / "out" / "report.json").read_text())
    assert saved["thresholds"]["min_views"] == 50
    assert saved["inputs"]["corpus"] == ["0.txt"]
    assert str(tmp_path) not in json.dumps(saved)
    text = format_report(report)
    assert f"together{report.queries:>26,}" in text
    assert sum(report.bigrams_by_pmi.values()) >= report.sources["bigrams"].found
    table = (tmp_path / "a" / "out" / "queries.tsv").read_text().splitlines()
    assert len(table) == report.queries + 1
    assert not (tmp_path / "a" / "out" / "counting").exists()


@pytest.mark.parametrize(("files", "memory"), [(2, 1_000_000), (6, 3)])
def test_the_list_does_not_depend_on_how_the_corpus_is_cut(files, memory, tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", files, memory=memory)
    for name in ("queries.parquet", "queries.tsv"):
        assert (tmp_path / "a" / "out" / name).read_bytes() == (tmp_path / "b" / "out" / name).read_bytes()


def test_the_list_is_what_the_matcher_takes(tmp_path):
    build(tmp_path / "a")
    found = list(rows(tmp_path / "a"))
    assert [found[i] for i in Matcher(found)("HOT DOG at St Louis")] == ["dog", "hot", "hot dog", "St. Louis"]


def test_lists_alone_are_enough(tmp_path):
    report = build(tmp_path / "a", corpus=(), pageviews=(), wordnet=None)
    assert list(rows(tmp_path / "a")) == ["Hot Dog", "St. Louis"]
    assert (report.tokens, list(report.sources)) == (0, ["list"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"empty\.txt holds no query"):
        build(tmp_path / "b", corpus=(), pageviews=(), wordnet=None, lists=(str(tmp_path / "empty.txt"),))


def test_no_source_and_no_sense_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no source of queries"):
        QueriesConfig(out=tmp_path)
    with pytest.raises(UsageError, match="min_views is 0"):
        QueriesConfig(out=tmp_path, lists=("a",), min_views=0)
