"""Fetched pairs to shards, in an order that does not depend on where a pair was found.

Every pair has a place in the order: a hash of (seed, key). A shard is a stretch of that order, so it needs pairs of all
parts. Two steps, so that no process holds more than a few shards and every picture is read and written twice:

    scatter   a task per part: its rows sorted by place, a row group for each task of the second step
    shards    a task per `shards_per_task` shards: collects its row groups of all parts, sorts, writes tars and indexes

A sample's JSON says where it came from: picture, page, queries, and the draw that admitted it. Keys that the folder's
tombstones name are not written again.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diptych import files
from diptych.curate import parts
from diptych.curate.balance import hash_keys
from diptych.curate.config_curate import WriteConfig
from diptych.curate.job import Job, Task, task_fingerprint
from diptych.curate.parts import DROPPED, Done
from diptych.curate.tasks import StageReport, part_name, tasks_of
from diptych.errors import ShardError, UsageError
from diptych.pair import Pair
from diptych.shards.dataset import DATASET_FILE, Dataset, describe
from diptych.shards.index import load_index
from diptych.shards.order import hash_positions
from diptych.shards.tombstones import DELETED, read_tombstones
from diptych.shards.write import shard_name, why_not, write_shard

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
