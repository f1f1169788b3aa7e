"""The processes that share one job: who I am among them, and what we tell each other.

`Ranks()` is a job of one process, where every exchange is the identity, so that code is written once. `connect()` makes
the others from what `torchrun` (or Slurm) put into the environment: gloo for CPUs, NCCL for GPUs.

Every exchange is counted in `Ranks.sent`, bytes that this rank puts on the wire by the ring algorithm.
"""

import contextlib
import datetime
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.errors import RankLostError, UsageError

TIMEOUT = 600.0
"""Seconds after which a rank that waits for another one gives up."""


@dataclass(frozen=True)
class Ranks:
    """One process of `world_size`. All of them must take part in every exchange, in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the number of its GPU."""
    sent: Counter[str] = field(default_factory=Counter, compare=False)
    """Bytes that this rank has sent, by kind of exchange."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's part of `count` things: every `world_size`-th one."""
        return range(self.rank, count, self.world_size)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [N, ...] of every rank, one after the other: [M, ...]. Ranks may hold different numbers of them."""
        if self.world_size == 1:
            return rows
        counts = self.counts(len(rows))
        longest = max(counts)
        if len(rows) < longest:
            rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        everyone = rows.new_empty(self.world_size * longest, *rows.shape[1:])
        self._count("all_gather", everyone, 1)
        _exchange("all_gather")(everyone, rows.contiguous())
        if min(counts) == longest:
            return everyone
        parts = everyone.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def reduce_scatter(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The reverse of `gather`: sum [M, ...] over the ranks, keep this rank's [N, ...]."""
        if self.world_size == 1:
            return rows
        longest = max(counts)
        if min(counts) < longest:
            padded = rows.new_zeros(self.world_size, longest, *rows.shape[1:])
            for part, mine, count in zip(padded, rows.split(counts), counts, strict=True):
                part[:count] = mine
            rows = padded.flatten(0, 1)
        mine = rows.new_empty(longest, *rows.shape[1:])
        self._count("reduce_scatter", rows, 1)
        _exchange("reduce_scatter")(mine, rows.contiguous())
        return mine[: counts[self.rank]]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            self._count("all_reduce", value, 2)
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: float) -> float:
        """The largest of every rank's number."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self._device)
        self._count("all_reduce", box, 2)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.item()

    def counts(self, mine: int) -> list[int]:
        """How many every rank has."""
        if self.world_size == 1:
            return [mine]
        everyone = torch.empty(self.world_size, dtype=torch.int64, device=self._device)
        self._count("all_gather", everyone, 1)
        _exchange("all_gather")(everyone, torch.tensor([mine], device=self._device))
        return everyone.tolist()

    def broadcast(self, value: Any = None) -> Any:
        """What the first rank says, for every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:
        """Until every rank has come here."""
        self.all_reduce_max(0.0)

    @contextlib.contextmanager
    def one_after_the_other(self) -> Iterator[None]:
        """The first rank alone, then the others: for what is made once and then found."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")

    def _count(self, kind: str, tensor: Tensor, ways: int) -> None:
        self.sent[kind] += ways * tensor.nbytes * (self.world_size - 1) // self.world_size


def _exchange(kind: str) -> Callable[..., object]:
    """An exchange of one tensor each, whose names PyTorch 2.13 changed."""
    return getattr(dist, f"{kind}_single", None) or getattr(dist, _BEFORE_2_13[kind])


_BEFORE_2_13 = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}


def connect(timeout: float = TIMEOUT, device: str = "auto") -> Ranks:
    """Join the job that the environment describes; a job of one if it describes none.

    `torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under `srun` the first three are read
    from Slurm's own variables. Raises UsageError if they are incomplete.
    """
    values = {name: os.environ.get(name) or os.environ.get(slurm) for name, slurm in _ENVIRONMENT.items()}
    world_size = int(values["WORLD_SIZE"] or 1)
    if values["RANK"] is None or (world_size == 1 and "MASTER_ADDR" not in os.environ):
        return Ranks()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"{world_size} ranks were started, but {' and '.join(missing)} are not set; "
            "start with torchrun, or export the first machine's name and a free port"
        )
    ranks = Ranks(int(values["RANK"]), world_size, int(values["LOCAL_RANK"] or 0))
    on_gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    with name_lost_ranks(ranks):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=ranks.rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
    return ranks


def current() -> Ranks:
    """The job that this process has joined with `connect`: for code that is called in the middle of one."""
    if not dist.is_initialized():
        return Ranks()
    local = os.environ.get("LOCAL_RANK") or os.environ.get(_ENVIRONMENT["LOCAL_RANK"]) or 0
    return Ranks(dist.get_rank(), dist.get_world_size(), int(local))


_ENVIRONMENT = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def disconnect(ranks: Ranks) -> None:
    """Leave the job, if there is one."""
    if ranks.world_size > 1 and dist.is_initialized():
        gc.collect()  # what still holds on to the group would keep its threads until the process is torn down
        dist.destroy_process_group()


@contextlib.contextmanager
def name_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Turn what the engine says when another rank does not answer into RankLostError."""
    try:
        yield
    except RuntimeError as error:  # torch has no one type for it: gloo raises RuntimeError, NCCL DistBackendError
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS_OF_LOSS)
        if ranks.world_size == 1 or not lost:
            raise
        raise RankLostError(
            f"rank {ranks.rank} of {ranks.world_size} lost the others ({str(error).splitlines()[0][:160]}); "
            "look at their output, then start the same command again: it continues from the last checkpoint"
        ) from error


_SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")
