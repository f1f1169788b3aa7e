"""The same parts on many machines, by Ray: actors that each hold the model and compute ranges of neighbouring parts.

Nothing but the ranges travels: every actor reads the inputs and writes the parts itself, by the functions that a single
machine uses, into the same folder. So `--out` and the inputs must be at the same paths everywhere. An actor that dies
costs a second try of its range by a new one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diptych.embed.bulk.config import EmbedConfig
from diptych.embed.bulk.folder import FeatureFolder, Part
from diptych.embed.bulk.pipeline import compute_parts, iter_contiguous_parts, open_pipeline
from diptych.embed.sources import Source
from diptych.errors import RankLostError, UsageError

TRIES = 2
"""How often a range is begun whose actor dies."""
PARTS = 8
"""That an actor is given at a time."""


class Actor:
    """A model on one machine."""

    def __init__(self, config: EmbedConfig, folder: FeatureFolder, sources: Sequence[Source]) -> None:
        self.pipeline = open_pipeline(config)
        self.folder, self.sources = folder, sources

    def compute(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Compute and write what is not done of these parts; how many inputs have a feature now, how many have none."""
        todo = [part for part in parts if self.folder.read_record(part) is None]
        if todo:
            compute_parts(self.pipeline, self.folder, self.sources, todo)
        records = [self.folder.read_record(part) for part in parts]
        done = [record for record in records if record is not None]
        return sum(record["features"] for record in done), sum(len(record["skipped"]) for record in done)


def run_on_ray(
    config: EmbedConfig,
    folder: FeatureFolder,
    sources: Sequence[Source],
    parts: Sequence[Part],
    on_rows: Callable[[int, int], None],
) -> None:
    """Compute parts on a Ray cluster: the one of RAY_ADDRESS, or one of this machine."""
    try:
        import ray
        from ray import exceptions
    except ImportError:
        raise UsageError("engine ray needs Ray; `pip install diptych[ray]`") from None
    if not parts:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    actors, resources = _size_actors(config, ray)
    threads = config.work.threads or resources["num_cpus"]
    config = replace(config, work=replace(config.work, threads=threads))
    shared = [ray.put(value) for value in (config, folder, list(sources))]
    kind: Any = ray.remote(**resources)(Actor)
    waiting = deque(iter_contiguous_parts(parts, max(1, min(PARTS, -(-len(parts) // (2 * actors))))))
    tries: dict[int, int] = {}
    running: dict[Any, tuple[Any, tuple[Part, ...]]] = {}
    idle = [kind.remote(*shared) for _ in range(min(actors, len(waiting)))]
    try:
        while waiting or running:
            while waiting and idle:
                stretch = waiting.popleft()
                tries[stretch[0].number] = tries.get(stretch[0].number, 0) + 1
                actor = idle.pop()
                running[actor.compute.remote(stretch)] = actor, stretch
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, stretch = running.pop(ready)
            try:
                on_rows(*ray.get(ready))
                idle.append(actor)
            except exceptions.RayTaskError as error:
                raise error.cause from None
            except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
                if tries[stretch[0].number] >= TRIES:
                    raise _lost(stretch, sources, error) from None
                waiting.appendleft(stretch)
                idle.append(kind.remote(*shared))
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)


def _size_actors(config: EmbedConfig, ray: Any) -> tuple[int, dict[str, Any]]:
    """How many actors, and what each takes: a GPU; or a machine's cores, shared if more actors are asked for."""
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), max(1, int(total.get("CPU", 1)))
    if gpus and config.work.device != "cpu":
        actors = min(config.work.actors or gpus, gpus)
        return actors, {"num_gpus": 1, "num_cpus": max(1, cpus // gpus), "scheduling_strategy": "SPREAD"}
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    actors = min(config.work.actors or machines, cpus)
    each = max(1, min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]))
    return actors, {"num_cpus": min(each, max(1, cpus // actors)), "scheduling_strategy": "SPREAD"}


def _lost(parts: tuple[Part, ...], sources: Sequence[Source], error: Exception) -> RankLostError:
    return RankLostError(
        f"parts {parts[0].name} to {parts[-1].name} of {sources[parts[0].source].name} ended their process {TRIES} "
        f"times ({type(error).__name__}); out of memory? Use a smaller --batch-size or fewer --threads, then start the "
        "same command again: it goes on with what is not done"
    )
