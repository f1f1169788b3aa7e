"""A model on many devices, by torch's own engines: DistributedDataParallel, or FSDP2's `fully_shard`.

Gradients are added over ranks, not averaged: the loss of the whole batch is differentiated, each rank has a part of it.
Whatever is evaluated is the whole model (`whole`), whatever is stored becomes one file (checkpoint/weights/write.py),
so that neither the engine nor the number of ranks is part of a checkpoint.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from diptych.checkpoint.loaded import rebuild
from diptych.model.clip import CLIP
from diptych.model.operators import norms
from diptych.model.transformer import ResidualAttentionBlock
from diptych.ranks import Ranks
from diptych.train.config import Sharding


def wrap(model: CLIP, ranks: Ranks, sharding: Sharding) -> nn.Module:
    """The module to call forward on. With `fsdp` the model itself is changed in place."""
    if ranks.world_size == 1:
        return model
    if sharding == "fsdp":
        return _shard(model, ranks)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # in forward; the argument has another name from PyTorch 2.13 on
    wrapped.register_comm_hook(ranks, _sum_bucket)
    return wrapped


def _sum_bucket(
    ranks: Ranks,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    ranks.sent["gradients"] += 2 * buffer.nbytes * (ranks.world_size - 1) // ranks.world_size
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _shard(model: CLIP, ranks: Ranks) -> CLIP:
    mesh = init_device_mesh(model.logit_scale.device.type, (ranks.world_size,))
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}  # too small to be cut
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock):
            fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(module, "read")
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def finish_gradients(model: CLIP, ranks: Ranks, sharding: Sharding) -> None:
    """Add what the engine left alone: FSDP2 does not cut, and so not add, the scalars."""
    if ranks.world_size > 1 and sharding == "fsdp":
        for parameter in model.parameters():
            if not parameter.ndim and parameter.grad is not None:
                ranks.sum(parameter.grad)


def average_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Running statistics of BatchNorm become the mean over ranks, so that every rank holds the same model."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if ranks.world_size == 1 or not buffers:
        return
    flat = ranks.sum(torch.cat([buffer.flatten() for buffer in buffers])).div_(ranks.world_size)
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over ranks; an exchange in which every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_cut(model: nn.Module) -> bool:
    """Whether the model is sharded over ranks by FSDP2."""
    return isinstance(model, FSDPModule)


def whole(model: CLIP) -> CLIP:
    """The model on this rank alone, to evaluate it: itself, or a copy of what FSDP2 has cut."""
    if not is_cut(model):
        return model
    state = {name: full(tensor) for name, tensor in model.state_dict().items()}
    return rebuild(model.config, state)


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a model that may be cut."""
    for name, target in model.state_dict().items():
        fill_tensor(target, tensors[name])


@torch.no_grad()
def fill_tensor(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or of one that is cut over ranks this rank's part: the rest is not looked at."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    (placement,) = target.placements
    assert isinstance(placement, Shard), placement
    part = target.to_local()
    chunks = value.chunk(target.device_mesh.size(), placement.dim)
    if part.numel():  # few rows leave the last ranks without any
        part.copy_(chunks[target.device_mesh.get_local_rank()])


def recompute_blocks(model: CLIP) -> None:
    """Let each Transformer block keep its inputs only."""
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.forward = _recomputed(module.forward)
            module.read = _recomputed(module.read)


def _recomputed(method: Any) -> Any:
    def forward(*inputs: Any) -> Tensor:
        return checkpoint(method, *inputs, use_reentrant=False) if torch.is_grad_enabled() else method(*inputs)

    return forward


def sum_of_squares(gradients: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all numbers in these tensors; of the whole ones, if they are sharded."""
    return torch.stack([full(norm).float() for norm in norms(list(gradients))]).square().sum()
