"""Web pages -> candidates: every picture that has a text, with where it was found.

    WARC, WAT, HTML --pages--> Page --sandbox, extract--> Found --> rows of CANDIDATES, some with a reason

A row with a reason may stand for more than a picture: a page that gave nothing (`page_...`, `opt_out`), a damaged
record (`record_...`) or a file that cannot be read. Those have an empty caption, and the page's address or `offset` in
the file, by which they can be looked at.
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from diptych.curate.pages.config import CrawlConfig
from diptych.curate.pages.page import (
    ARCHIVES,
    FILE_UNREADABLE,
    PLAIN,
    Drop,
    Page,
    may_hold_pictures,
    open_input,
    read_pages,
)
from diptych.curate.pages.sandbox import Answer, Parser
from diptych.curate.rows import CANDIDATES, key_of, outcome
from diptych.errors import NotFoundError, UsageError, install
from diptych.pair import format_details
from diptych.stage.run import Engine, StageReport, Task, part_name

if TYPE_CHECKING:
    from diptych.curate.pages.extract import Extract

LOG = logging.getLogger(__name__)
NO_PAIR = "page_no_pair"
"""The reason of a page without a picture that has a text."""

LISTS = (".paths", ".paths.gz")
_SCHEMA = outcome(CANDIDATES)
_COLUMNS = ("key", "caption", "image_url", "page_url", "reason")
_DETAILS = ("from", "crawl", "width", "height", "offset")
_BATCH_PAGES, _BATCH_BYTES = 128, 2 << 20
_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """Stage: paths of files in, candidates out. The parser's process lives as long as the input."""

    texts: tuple[str, ...]
    lazy: tuple[str, ...]
    srcset: bool
    opt_outs: tuple[str, ...]
    page_bytes: int
    page_seconds: float
    parser_bytes: int
    pages_at: str = ""
    roots: tuple[str, ...] = ()
    """Folders that plain HTML files are named relative to, for their URLs."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Read file after file."""
        extract = _import_extract()(texts=self.texts, lazy=self.lazy, srcset=self.srcset, opt_outs=self.opt_outs)
        with Parser(extract, page_seconds=self.page_seconds, memory=self.parser_bytes) as parser:
            rows = _Rows()
            for batch in batches:
                for path in batch.column("path").to_pylist():
                    for pages, drops in _in_batches(self._read(path)):
                        rows.add(posixpath.basename(path), pages, _parse(pages, parser), drops)
                        if len(rows) >= _BATCH_ROWS:
                            yield rows.take()
            if len(rows):
                yield rows.take()

    def _read(self, path: str) -> Iterator[Page | Drop]:
        try:
            with open_input(path) as stream:
                yield from read_pages(stream, path, self._url_of(path), self.page_bytes)
        except OSError as error:
            if isinstance(error, NotFoundError):
                raise
            yield Drop("", FILE_UNREADABLE, 0)

    def _url_of(self, path: str) -> str:
        if not self.pages_at or not path.endswith(PLAIN):
            return ""
        root = max((root for root in self.roots if path.startswith(f"{root}/")), key=len, default="")
        place = path[len(root) + 1 :] if root else posixpath.basename(path)
        return f"{self.pages_at.rstrip('/')}/{place}"


def run(config: CrawlConfig, *, engine: Engine) -> StageReport:
    """Make candidates of all inputs; a task is an archive, or some plain files."""
    _import_extract()  # says at once if a library is missing
    archives, plain, roots = find_inputs(config.inputs, config.prefix)
    groups = [(path,) for path in archives]
    groups += [tuple(plain[i : i + config.files_per_task]) for i in range(0, len(plain), config.files_per_task)]
    tasks = [Task(part_name(i), tuple(map(_as_input, group)), rows=False) for i, group in enumerate(groups)]
    decides: dict[str, Any] = {
        "texts": config.texts,
        "lazy": config.lazy,
        "srcset": config.srcset,
        "opt_outs": config.opt_outs,
        "page_bytes": config.page_bytes,
        "page_seconds": config.page_seconds,
        "parser_bytes": config.parser_bytes,
        "pages_at": config.pages_at,
    }
    return engine.run_stage(Crawl(**decides, roots=roots), tasks, config.out, decides, schema=CANDIDATES)


def _import_extract() -> "type[Extract]":
    try:
        from diptych.curate.pages.extract import Extract
    except ImportError as error:
        raise UsageError(f"{error}; reading web pages needs more libraries: {install('curate')}") from None
    return Extract


def _parse(pages: Sequence[Page], parser: Parser) -> list[Answer]:
    """What the pages hold; those without any picture are not sent over."""
    sent = [may_hold_pictures(page) for page in pages]
    answers = iter(parser([page for page, one in zip(pages, sent, strict=True) if one]))
    return [next(answers) if one else [] for one in sent]


def find_inputs(inputs: Sequence[str], prefix: str = "") -> tuple[list[str], list[str], tuple[str, ...]]:
    """Archives and plain files that the inputs name, each sorted and once, and the folders among the inputs."""
    archives: set[str] = set()
    plain: set[str] = set()
    others = Counter[str]()
    roots: set[str] = set()
    for given in inputs:
        for place in _read_list(given, prefix) if given.endswith(LISTS) else [given]:
            if place.endswith(ARCHIVES):
                archives.add(place)
            elif place.endswith(PLAIN):
                plain.add(place)
            else:
                found = _list_folder(place)
                archives.update(path for path in found if path.endswith(ARCHIVES))
                plain.update(path for path in found if path.endswith(PLAIN))
                others.update(_suffixes(path) for path in sorted(found) if not path.endswith((*ARCHIVES, *PLAIN)))
                roots.add(place.rstrip("/"))
    unread = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in others.most_common(8))
    if not archives and not plain:
        raise NotFoundError(
            f"no page in {', '.join(inputs)}; files that end with {', '.join((*ARCHIVES, *PLAIN))} are read"
            + (f", others are there: {unread}" if unread else "")
        )
    if unread:
        LOG.warning("%s files are not read as pages: %s", f"{others.total():,}", unread)
    return sorted(archives), sorted(plain), tuple(sorted(roots))


def _suffixes(path: str) -> str:
    """The suffix of a file, with the one before it where that says what was packed: .warc.zst."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    before = posixpath.splitext(stem)[1]
    return f"{before if before in ('.warc', '.arc', '.wat', '.wet', '.html') else ''}{suffix}"


def _as_input(place: str) -> Path | str:
    return place if "://" in place else Path(place)


def _read_list(place: str, prefix: str) -> list[str]:
    """The lines of a list such as Common Crawl's warc.paths.gz."""
    open_input(place).close()  # with our words, if it is not there
    with fsspec.open(place, "rt", encoding="utf-8", compression="infer") as lines:
        return [prefix + line.strip() for line in lines if line.strip()]


def _list_folder(place: str) -> list[str]:
    try:
        store, root = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{place} cannot be listed: {error}; {install('remote')} for http") from None
    if not store.isdir(root):
        raise NotFoundError(
            f"{place} is neither a folder that is there nor named like a file of pages, which ends with "
            f"{', '.join((*ARCHIVES, *PLAIN, *LISTS))}"
        )
    below = len(str(root).rstrip("/"))
    return [f"{place.rstrip('/')}/{str(path)[below:].lstrip('/')}" for path in store.find(root)]


def _in_batches(found: Iterator[Page | Drop]) -> Iterator[tuple[list[Page], list[tuple[int, Drop]]]]:
    """Pages for one talk with the parser; and drops, each with the number of pages before it."""
    pages: list[Page] = []
    drops: list[tuple[int, Drop]] = []
    size = 0
    for one in found:
        if isinstance(one, Drop):
            drops.append((len(pages), one))
        else:
            pages.append(one)
            size += len(one.body)
        if len(pages) >= _BATCH_PAGES or size >= _BATCH_BYTES or len(drops) >= _BATCH_ROWS:
            yield pages, drops
            pages, drops, size = [], [], 0
    if pages or drops:
        yield pages, drops


class _Rows:
    """Columns of rows to come."""

    def __init__(self) -> None:
        self._columns: list[list[Any]] = [[] for _ in (*_COLUMNS, *_DETAILS)]

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(
        self, crawl: str, pages: Sequence[Page], answers: Sequence[Answer], drops: Sequence[tuple[int, Drop]]
    ) -> None:
        """Rows of some pages of one file, in the file's order."""
        left = iter([*drops, (len(pages) + 1, None)])
        place, drop = next(left)
        for number in range(len(pages) + 1):
            while drop is not None and place == number:
                self._append(f"{crawl}@{drop.offset}", drop.url, drop.reason, crawl, drop.offset)
                place, drop = next(left)
            if number < len(pages):
                self._add_page(crawl, pages[number].url, answers[number])

    def _add_page(self, crawl: str, page_url: str, answer: Answer) -> None:
        if isinstance(answer, str) or not answer or not answer[0]:
            self._append(page_url, page_url, answer if isinstance(answer, str) else NO_PAIR, crawl, None)
            return
        addresses, captions, origins, widths, heights, reasons = answer
        keys, count = list(map(key_of, addresses, captions)), len(captions)
        pages, crawls, offsets = [page_url or None] * count, [crawl] * count, [None] * count
        given = [address or None for address in addresses]
        sizes = ([int(size) if size else None for size in sizes] for sizes in (widths, heights))
        added = keys, captions, given, pages, reasons, origins, crawls, *sizes, offsets
        for column, values in zip(self._columns, added, strict=True):
            column += values

    def _append(self, identity: str, page_url: str, reason: str, crawl: str, offset: int | None) -> None:
        row = (key_of(identity, ""), "", None, page_url or None, reason, None, crawl, None, None, offset)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def take(self) -> pa.RecordBatch:
        """All rows so far."""
        count = len(self)
        named = {name: pa.array(values, pa.string()) for name, values in zip(_COLUMNS, self._columns, strict=False)}
        named["image"] = pa.nulls(count, pa.binary())
        known = zip(*self._columns[len(_COLUMNS) :], strict=True)
        named["details"] = pa.array([_details_of(values) for values in known], pa.string())
        self._columns = [[] for _ in self._columns]
        return pa.RecordBatch.from_arrays([named[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _details_of(values: Sequence[Any]) -> str:
    return format_details({name: value for name, value in zip(_DETAILS, values, strict=True) if value is not None})
