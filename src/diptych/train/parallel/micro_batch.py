"""The number of pairs that fit into memory at once."""

import os
from pathlib import Path

import torch
from torch import Tensor

from diptych.errors import UsageError
from diptych.ranks import Ranks
from diptych.shards.loader import Batch
from diptych.train.step import Step, frozen_statistics

SHARE = 0.5
"""Share of the free memory that activations may take: gradients, the optimizer and the loader need the rest."""


def choose_micro_batch_size(step: Step, batch: Batch, ranks: Ranks, free: int | None = None) -> int:
    """The largest power of two of pairs whose activations fit beside the rest, at most the rank's part of the batch.

    Measured, not estimated: what autograd keeps for two sizes of a real batch gives the bytes a pair.
    """
    count = len(batch.image)
    few, more = 8, 16
    if count <= more:
        return count
    kept = [kept_bytes(step, batch, size) for size in (few, more)]
    per_pair = max(1, (kept[1] - kept[0]) // (more - few))
    if free is None:
        free = free_memory(step.device) // ranks_here(ranks)
    room = int(SHARE * free) - 3 * sum(4 * parameter.numel() for parameter in step.plain.parameters())
    if room < few * per_pair:
        raise UsageError(
            f"{free / 2**30:.1f} GiB of free memory do not hold this model and {few} pairs at "
            f"{per_pair / 2**20:.0f} MiB each; use a smaller model, --recompute, or more memory"
        )
    fits = min(count, room // per_pair)
    fits = -int(ranks.all_reduce_max(-float(fits)))  # every rank takes the smallest
    return count if fits >= count else 1 << (fits.bit_length() - 1)


def kept_bytes(step: Step, batch: Batch, size: int) -> int:
    """Bytes that autograd keeps for the derivatives of `size` pairs, weights not counted."""
    seen: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in step.plain.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with frozen_statistics(step.plain), hooks:
        output = step.forward(batch, slice(0, size), 0)
    del output
    return sum(seen.values())


def free_memory(device: torch.device, told_by: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and its control group; half of the machine
    where nothing tells what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not told_by.exists():  # it is Linux's
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":") for line in told_by.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def ranks_here(ranks: Ranks) -> int:
    """Ranks that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
