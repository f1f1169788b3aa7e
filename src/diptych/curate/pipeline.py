"""From web pages to shards in one work folder: every stage in turn, each resumable and auditable alone.

    crawl -> filter -> distinct -> match -> balance -> fetch -> pictures -> shards

Stages that are finished cost a look at their files. A stage whose settings or inputs changed is refused, or with `redo`
made anew, and all behind it.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diptych import files
from diptych.config import from_dict
from diptych.curate import write
from diptych.curate.balance import balance, match
from diptych.curate.balance.config import BalanceConfig, MatchConfig
from diptych.curate.config import PipelineConfig, WriteConfig
from diptych.curate.fetch import run as fetch
from diptych.curate.fetch.config import FetchConfig
from diptych.curate.funnel import Funnel, FunnelStage, read_funnel, write_report
from diptych.curate.images import select
from diptych.curate.images.config import PicturesConfig
from diptych.curate.images.select import Score
from diptych.curate.pages import crawl
from diptych.curate.pages.config import CrawlConfig
from diptych.curate.text import dedup
from diptych.curate.text import filter as filters
from diptych.curate.text.config import FilterConfig, NearTextConfig
from diptych.errors import NotFoundError, UsageError, unknown_name
from diptych.stage.folder import read_manifest
from diptych.stage.run import Engine

STAGES = ("crawl", "filter", "distinct", "match", "balance", "fetch", "pictures", "shards")
"""Folders of the stages, in order."""
_CURES = {
    "url_invalid": "say where the pages were: `pages_at` in the table [crawl] of --settings",
    "page_no_pair": "the pages have no picture with a text; see `texts` and `lazy` in the table [crawl] of --settings",
    "opt_out": "the pages ask not to be trained on",
    "language": "see `languages` and `language_margin` in the table [filter] of --settings",
    "no_query": "no text has any of the queries; take another list (--queries)",
    **dict.fromkeys(
        ("address", "port"),
        "only public addresses and the usual ports are asked; a machine of your own is named by --allow-host HOST:PORT",
    ),
}
"""The first reason of a stage that left nothing -> what to do."""
_TABLES = (*STAGES[:-1], "write")

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What came of all stages."""

    folder: Path
    """Folder of the last stage: the shards, unless the run was to end before."""
    funnel: Funnel
    html: Path
    """The funnel for people."""
    hash: str
    """SHA-256 of the last stage's manifest, and so of everything before it."""
    left_nothing: str = ""
    """Why no row was left, by which stage, and what changes it; the stages behind it were not run."""


def run(
    config: PipelineConfig,
    *,
    engine: Engine,
    scorer: Callable[[str], Score] | None = None,
    until: str = STAGES[-1],
) -> PipelineReport:
    """Run what is not finished yet, up to and with the stage `until`, or one that leaves nothing; `scorer` opens a
    model that rates pairs."""
    if until not in STAGES:
        raise unknown_name("stage", until, STAGES)
    done = STAGES[: STAGES.index(until) + 1]
    if "match" in done:
        match.queries_file(config.queries)  # says now if there is none
    steps = _build_steps(config, engine, scorer)
    for number, name in enumerate(done):
        steps[name]()
        if not read_manifest(config.work / name).kept:
            done = done[: number + 1]
            break
    funnel = read_funnel([config.work / name for name in done])
    html = write_report(config.work, funnel)
    last = funnel.stages[-1]
    return PipelineReport(
        folder=config.work / done[-1],
        funnel=funnel,
        html=html,
        hash=last.hash,
        left_nothing="" if last.kept else _explain_nothing(last),
    )


def _explain_nothing(stage: FunnelStage) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in stage.dropped.items())
    usual = f"see the options of `diptych curate {stage.name} --help`; those without a flag of `run` go into --settings"
    advice = _CURES.get(next(iter(stage.dropped), ""), usual)
    return f"{stage.name} left none of its {stage.rows:,} rows ({reasons or 'none came'}), so the run ends; {advice}"


def _build_steps(
    config: PipelineConfig, engine: Engine, scorer: Callable[[str], Score] | None
) -> dict[str, Callable[[], object]]:
    """Each stage with its settings; all are read before any is run."""
    made = _Settings(config.settings)
    folder = {name: config.work / name for name in STAGES}
    listed = config.queries / "queries.parquet" if config.queries.suffix != ".parquet" else config.queries
    crawling = made.build(CrawlConfig, "crawl", inputs=list(config.inputs), out=folder["crawl"])
    filtering = made.build(FilterConfig, "filter", folder=folder["crawl"], out=folder["filter"])
    comparing = made.build(NearTextConfig, "distinct", folder=folder["filter"], out=folder["distinct"])
    matching = made.build(MatchConfig, "match", pairs=folder["distinct"], queries=listed, out=folder["match"])
    balancing = made.build(
        BalanceConfig,
        "balance",
        pairs=folder["match"],
        queries=listed,
        out=folder["balance"],
        policy=config.policy,
        limit=config.limit,
        seed=config.seed,
    )
    fetching = made.build(
        FetchConfig,
        "fetch",
        folder=folder["balance"],
        out=folder["fetch"],
        contact=config.contact,
        allow_host=list(config.allow_host),
    )
    choosing = made.build(PicturesConfig, "pictures", folder=folder["fetch"], out=folder["pictures"])
    score = scorer(choosing.model) if scorer is not None and choosing.model is not None else None
    writing = made.build(
        WriteConfig, "write", folder=folder["pictures"], out=folder["shards"], queries=listed, seed=config.seed
    )
    return {
        "crawl": lambda: crawl.run(crawling, engine=engine),
        "filter": lambda: filters.run(filtering, engine=engine),
        "distinct": lambda: dedup.run(comparing, engine=engine),
        "match": lambda: match.run(matching, engine=engine),
        "balance": lambda: balance.run(balancing, engine=engine),
        "fetch": lambda: fetch.run(fetching, engine=engine),
        "pictures": lambda: select.run(choosing, engine=engine, score=score),
        "shards": lambda: write.run(writing, engine=engine),
    }


class _Settings:
    """The tables of a TOML file, for the options that have no flag of their own."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tables: dict[str, Any] = {}
        if path is None:
            return
        try:
            self._tables = tomllib.loads(files.read_text(path))
        except FileNotFoundError:
            raise NotFoundError(f"no such file: {path} (a TOML file with a table for each stage)") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not TOML: {error}") from None
        for name in self._tables:
            if name not in _TABLES:
                raise unknown_name(f"stage in {path}", name, _TABLES)

    def build(self, cls: type[Config], name: str, **given: Any) -> Config:
        """The settings of a stage: those of the file, and those that the pipeline gives."""
        table = self._tables.get(name, {})
        if not isinstance(table, Mapping):
            raise UsageError(f"{name} in {self._path} is not a table; write [{name}] and its options below")
        for key in table:
            if key in given:
                raise UsageError(f"{key} of {name} in {self._path} is given on the command line; leave it out there")
        values = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        return from_dict(cls, {**table, **values})
