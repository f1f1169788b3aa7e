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

from diptych.config import from_dict
from diptych.curate import balance as balance_stage
from diptych.curate import crawl, fetch, filters, near_text, write
from diptych.curate import match as match_stage
from diptych.curate import select as select_stage
from diptych.curate.config_crawl import CrawlConfig, FilterConfig, NearTextConfig
from diptych.curate.config_curate import PipelineConfig, WriteConfig
from diptych.curate.config_fetch import FetchConfig, PicturesConfig
from diptych.curate.config_match import BalanceConfig, MatchConfig
from diptych.curate.match import queries_file
from diptych.curate.report import Funnel, read_funnel, write_report
from diptych.curate.select import Score
from diptych.curate.tasks import Execute, ExecuteJob
from diptych.errors import NotFoundError, UsageError, unknown_name

STAGES = ("crawl", "filter", "distinct", "match", "balance", "fetch", "pictures", "shards")
"""Folders of the stages, in order."""
_TABLES = (*STAGES[:-1], "write")

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What came of all stages."""

    shards: Path
    funnel: Funnel
    html: Path
    """The funnel for people."""
    hash: str
    """Of the manifest of the shards, and so of everything before it."""


def run(
    config: PipelineConfig,
    *,
    execute: Execute,
    execute_job: ExecuteJob,
    score: Score | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> PipelineReport:
    """Run what is not finished yet; `score` rates (picture, text), `on_stage` is told the name of each stage."""
    work, made = config.work, _Settings(config.settings)
    queries = queries_file(config.queries)
    folder = {name: work / name for name in STAGES}
    crawling = made.build(CrawlConfig, "crawl", inputs=list(config.inputs), out=folder["crawl"])
    filtering = made.build(FilterConfig, "filter", folder=folder["crawl"], out=folder["filter"])
    comparing = made.build(NearTextConfig, "distinct", folder=folder["filter"], out=folder["distinct"])
    matching = made.build(MatchConfig, "match", pairs=folder["distinct"], queries=queries, out=folder["match"])
    balancing = made.build(
        BalanceConfig,
        "balance",
        pairs=folder["match"],
        queries=queries,
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
    writing = made.build(
        WriteConfig, "write", folder=folder["pictures"], out=folder["shards"], queries=queries, seed=config.seed
    )
    steps: dict[str, Callable[[], object]] = {
        "crawl": lambda: crawl.run(crawling, execute=execute),
        "filter": lambda: filters.run(filtering, execute=execute),
        "distinct": lambda: near_text.run(comparing, execute=execute),
        "match": lambda: match_stage.run(matching, execute=execute),
        "balance": lambda: balance_stage.run(balancing, execute=execute),
        "fetch": lambda: fetch.run(fetching, execute=execute),
        "pictures": lambda: select_stage.run(choosing, execute=execute, score=score),
        "shards": lambda: write.run(writing, execute=execute_job),
    }
    for name, step in steps.items():
        if on_stage is not None:
            on_stage(name)
        step()
    funnel = read_funnel([folder[name] for name in STAGES])
    html = write_report(work, funnel)
    return PipelineReport(shards=folder["shards"], funnel=funnel, html=html, hash=funnel.stages[-1].hash)


class _Settings:
    """The tables of a TOML file, for the options that have no flag of their own."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tables: dict[str, Any] = {}
        if path is None:
            return
        try:
            self._tables = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise NotFoundError(f"no such file: {path} (a TOML file with a table for each stage)") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
