"""Fetched pairs to shards, in an order that does not depend on where a pair was found.

Every pair has a place in the order: a hash of (seed, key). A shard is a stretch of that order, so it needs pairs of all
parts. Two steps, so that no process holds more than a few shards and every picture is read and written twice:

    scatter   a task per part: its rows sorted by place, a row group for each task of the second step
    shards    a task per `shards_per_task` shards: collects its row groups of all parts, sorts, writes tars and indexes

A sample's JSON says where it came from: picture, page, queries, and the draw that admitted it. Keys that the folder's
tombstones name are not written again.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from diptych.curate import parts
from diptych.curate.config_curate import WriteConfig
from diptych.curate.job import Job, Task
from diptych.curate.tasks import StageReport, tasks_of

SCATTER = "scatter"


class ExecuteJob(Protocol):
    """What runs a job: `tasks.run_job` with an engine chosen by the caller."""

    def __call__(
        self, job: Job, tasks: Sequence[Task], *, config: dict[str, Any], parent: str | None = None
    ) -> StageReport:
        """Run it."""
        ...


def run(config: WriteConfig, *, execute: ExecuteJob) -> StageReport:
    """Write the shards; raises UsageError if no pair is left to write."""
    source = parts.read_manifest(config.folder)
    described = parts.describe_config(config, config.out)
    fingerprint = parts.fingerprint(config.out.name, described, source.hash)
    cuts, groups = _cut(config)
    scatter = config.out / SCATTER
    tasks = [
        Task(f"{i * config.shards_per_task:05d}", tuple(scatter / f"{task.name}.parquet" for task in tasks_of(config.folder)))
        for i in range(groups)
    ]
    raise NotImplementedError
