"""`diptych curate`: from web pages to shards, a stage at a time or all in one."""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diptych.cli.output import ProgressBar, list_counts, printable, shorten
from diptych.curate.balance.config import BalanceConfig, MatchConfig
from diptych.curate.config import DeleteConfig, LinksConfig, PipelineConfig, WriteConfig
from diptych.curate.fetch.config import FetchConfig
from diptych.curate.images.config import ContaminationConfig, PicturesConfig
from diptych.curate.pages.config import CrawlConfig
from diptych.curate.queries.config import QueriesConfig
from diptych.curate.text.config import FilterConfig, NearTextConfig
from diptych.errors import UsageError
from diptych.stage.config import EngineConfig

if TYPE_CHECKING:
    from diptych.checkpoint.loaded import Loaded
    from diptych.stage.run import Engine, StageReport


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Build the list of queries from texts, page views, WordNet and lists of one's own.

    Example: diptych curate queries --out queries --wordnet wordnet/ --corpus enwiki.xml.bz2
    """

    queries: QueriesConfig

    def __call__(self) -> int:
        from diptych.curate.queries import build as queries

        report = queries.run(self.queries)
        for name, source in report.sources.items():
            left_out = _dropped({"empty": source.empty, "too long": source.long})
            print(f"{name}: {source.found:,} found, {source.new:,} of them new{left_out}")
        print(f"{report.queries:,} queries: {self.queries.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """Web pages (WARC, WAT, HTML) -> candidates: every picture with a text about it.

    Example: diptych curate crawl --inputs crawl/a.warc.gz --out wit/crawl
    """

    crawl: CrawlConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.pages import crawl

        return _run_stage(self.engine, partial(crawl.run, self.crawl))


@dataclass(frozen=True, kw_only=True)
class Links:
    """Lists of addresses with captions (LAION, DataComp, CC12M, COYO, ...) -> candidates, as crawl makes them.

    Example: diptych curate links --inputs laion/*.parquet --out candidates
    """

    links: LinksConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate import links

        sources = links.open_lists(self.links)
        for source in sources[:20]:
            print(f"{shorten(source.name, 200)}: {shorten(source.said, 400)}")
        return _run_stage(self.engine, partial(links.run, self.links, sources))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Candidates -> those whose text may be worth learning from.

    Example: diptych curate filter --folder wit/crawl --out wit/filter
    """

    filter: FilterConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.text import filter as filters

        return _run_stage(self.engine, partial(filters.run, self.filter))


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """Candidates -> those that are no copy, or near copy, of another.

    Example: diptych curate distinct --folder wit/filter --out wit/distinct
    """

    distinct: NearTextConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.text import dedup

        return _run_stage(self.engine, partial(dedup.run, self.distinct))


@dataclass(frozen=True, kw_only=True)
class Match:
    """Candidates -> those whose text contains a query, with the queries.

    Example: diptych curate match --pairs wit/distinct --queries queries/queries.parquet --out wit/match
    """

    match: MatchConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.balance import match

        return _run_stage(self.engine, partial(match.run, self.match))


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Matched pairs -> a share of them, so that common queries do not drown the rare ones.

    Example: diptych curate balance --pairs wit/match --queries queries/queries.parquet --out wit/balance
    """

    balance: BalanceConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.balance import balance

        with _open_engine(self.engine) as engine:
            report = balance.run(self.balance, engine=engine)
        print(balance.format_report(report))
        return _print_stage(report.stage)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Pairs with the addresses of pictures -> pairs with pictures; run it again to try again what failed.

    Example: diptych curate fetch --folder wit/balance --out wit/fetch --contact https://me.example
    """

    fetch: FetchConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.fetch import run as fetch

        with _open_engine(self.engine) as engine, _counting("fetching") as show:
            report = fetch.run(self.fetch, engine=engine, on_progress=show)
        print(f"addresses: {list_counts(report.outcomes)}")
        return _print_stage(report.stage)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pairs with pictures -> those whose picture is no copy, was not tested on, and fits its text.

    Example: diptych curate pictures --folder wit/fetch --out wit/pictures
    """

    pictures: PicturesConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.images import select

        with _open_engine(self.engine) as engine:
            score = None if self.pictures.model is None else ClipScore(self.pictures.model)
            report = select.run(self.pictures, engine=engine, score=score)
        return _print_stage(report)


@dataclass(frozen=True, kw_only=True)
class Write:
    """Pairs with pictures -> shards, in an order that does not depend on where a pair was found.

    Example: diptych curate write --folder wit/pictures --out wit/shards
    """

    write: WriteConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate import write

        return _run_stage(self.engine, partial(write.run, self.write))


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Which pictures of an evaluation set are, or look like, pictures of a training set.

    Example: diptych curate contamination --data wit/shards --against pets/ --out overlap
    """

    contamination: ContaminationConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate.images import contamination

        with _open_engine(self.engine) as engine:
            report = contamination.run(self.contamination, engine=engine)
        print(
            f"{report.overlapping:,} of {report.against:,} pictures ({report.share:.2%}) have a copy among "
            f"{report.pictures:,}; hashes that differ in up to {report.max_distance} bits count as copies, which finds "
            f"{report.recall:.1%} of copies made for the purpose, and by chance at most {report.expected_false:.1f}"
            f"{_dropped(report.unreadable)}"
        )
        if not report.promised:
            print(
                f"warning: a precision of {self.contamination.precision:g} is not shown by so few pictures against "
                f"{report.pictures:,}: some of what was found may be no copy; look at overlap.parquet"
            )
        print(f"folder: {self.contamination.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete samples from shards: who reads them leaves these out; --compact takes out their bytes.

    Example: diptych curate delete wit/shards --key 00001 00002
    """

    shards: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Folder of shards."""
    key: tuple[str, ...] = ()
    """Keys of samples."""
    url: tuple[str, ...] = ()
    """Addresses of pictures or of pages; a page takes all pictures found on it along."""
    file: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A file with a key or an address on each line."""
    compact: bool = False
    """Write the shards that are concerned anew, without the bytes of what was deleted, now or before. This makes it
    another dataset: a training run that is under way cannot go on with it."""

    def __call__(self) -> int:
        from diptych.curate import delete

        config = DeleteConfig(shards=self.shards, key=self.key, url=self.url, file=self.file, compact=self.compact)
        report = delete.run(config)
        print(f"deleted: {report.deleted:,} samples; {report.before:,} had been deleted before")
        for name in report.not_found:
            print(f"  not found: {printable(name)}")
        if report.compacted is not None:
            one = report.compacted
            print(f"compacted: {one.samples:,} samples out of {one.shards:,} shards, {one.freed:,} bytes freed")
        return 1 if report.not_found else 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """All stages in one work folder: crawl, filter, distinct, match, balance, fetch, pictures, shards; then the funnel.

    Stop it whenever you like; the same command goes on.

    Example: diptych curate run --work wit --inputs crawl/a.warc.gz --queries queries --contact https://me.example
    """

    pipeline: PipelineConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> int:
        from diptych.curate import pipeline

        with _open_engine(self.engine) as engine:
            report = pipeline.run(self.pipeline, engine=engine, scorer=ClipScore)
        print(report.funnel)
        print(f"report: {report.html}")
        if report.left_nothing:
            raise UsageError(report.left_nothing)
        print(f"shards: {report.folder}  (manifest {report.hash})")
        return 0


COMMANDS: dict[str, type] = {
    "queries": Queries,
    "crawl": Crawl,
    "links": Links,
    "filter": Filter,
    "distinct": Distinct,
    "match": Match,
    "balance": Balance,
    "fetch": Fetch,
    "pictures": Pictures,
    "write": Write,
    "contamination": Contamination,
    "delete": Delete,
    "run": Run,
}
"""By name; `cli/__init__.py` hangs them below `diptych curate`."""

Stage = (
    Annotated[Queries, tyro.conf.subcommand("queries")]
    | Annotated[Crawl, tyro.conf.subcommand("crawl")]
    | Annotated[Links, tyro.conf.subcommand("links")]
    | Annotated[Filter, tyro.conf.subcommand("filter")]
    | Annotated[Distinct, tyro.conf.subcommand("distinct")]
    | Annotated[Match, tyro.conf.subcommand("match")]
    | Annotated[Balance, tyro.conf.subcommand("balance")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[Pictures, tyro.conf.subcommand("pictures")]
    | Annotated[Write, tyro.conf.subcommand("write")]
    | Annotated[Contamination, tyro.conf.subcommand("contamination")]
    | Annotated[Delete, tyro.conf.subcommand("delete")]
    | Annotated[Run, tyro.conf.subcommand("run")]
)


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Make a dataset of web pages: a stage at a time, each from a folder into a folder, or `run` for all.

    Example: diptych curate run --work wit --inputs crawl/a.warc.gz --queries queries --contact https://me.example
    """

    stage: Stage

    def __call__(self) -> int:
        return self.stage()


@dataclass(frozen=True)
class ClipScore:
    """Cosines of pictures and their texts, by a model that each process opens once."""

    model: str

    def __call__(self, images: Sequence[bytes], texts: Sequence[str]) -> list[float]:
        from diptych.embed.images import embed_images
        from diptych.embed.texts import embed_texts

        loaded = _load_model(self.model)
        return (embed_images(loaded, images) * embed_texts(loaded, texts)).sum(dim=-1).tolist()


@lru_cache(maxsize=1)
def _load_model(name: str) -> "Loaded":
    from diptych.checkpoint.layouts import load

    return load(name)


@contextlib.contextmanager
def _open_engine(config: EngineConfig) -> "Iterator[Engine]":
    """The engine, with a progress bar of the tasks of whatever stage is run."""
    from diptych.stage.run import Engine

    with (
        ProgressBar() as bar,
        Engine.open(config, lambda stage, _, done, total: bar.update(done, total, "tasks", stage)) as engine,
    ):
        yield engine


@contextlib.contextmanager
def _counting(what: str) -> Iterator[Callable[[Counter[str]], None]]:
    """Say now and then how many of what there are."""
    yield lambda counts: print(f"{what}: {list_counts(dict(counts.most_common(5)))}", file=sys.stderr, flush=True)


def _run_stage(config: EngineConfig, run: "Callable[..., StageReport]") -> int:
    with _open_engine(config) as engine:
        report = run(engine=engine)
    return _print_stage(report)


def _print_stage(report: "StageReport") -> int:
    """Say what a stage did."""
    print(f"{report.stage}: {report.rows:,} rows, {report.kept:,} kept{_dropped(report.dropped)}")
    print(f"tasks: {report.done:,} done, {report.found:,} had been done before; {report.seconds:.1f} s")
    print(f"folder: {printable(report.folder)}  (manifest {report.hash})")
    return 0


def _dropped(reasons: Mapping[str, int]) -> str:
    return f"; dropped: {list_counts(reasons)}" if any(reasons.values()) else ""
