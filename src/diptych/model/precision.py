"""How exactly a model is used: blocks of a tower, made ready once for a named precision.

`exact` is the weights as they are. `bfloat16` is a copy of the linear layers in bfloat16 (8 bits of mantissa); what
is added up over many layers, the residual stream and LayerNorm, stays float32, and so do embeddings and projections.
"""

import copy
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diptych.errors import unknown_name
from diptych.model.config import PRECISIONS, Precision
from diptych.model.transformer import MLP, QuickGELU, ResidualAttentionBlock, Transformer


class Ready(NamedTuple):
    """The blocks of a tower, ready for inference: they are given inputs of `dtype`."""

    blocks: list[ResidualAttentionBlock]
    dtype: torch.dtype


_State = tuple[tuple[int, int, int], ...]
_READY: WeakKeyDictionary[Transformer, dict[torch.dtype, tuple[_State, Ready]]] = WeakKeyDictionary()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied faster than float32: by a GPU, by a CPU with instructions for it.

    The processor is asked, not the clock, so the answer is the same every time.
    """
    if device.type != "cpu":
        return True
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on a device; any other precision is itself."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision


def get_ready(transformer: Transformer, precision: Precision) -> Ready:
    """The blocks in a precision; made once and again when a weight was changed, moved or replaced.

    A change through `.data`, which PyTorch does not count, is not seen.
    """
    weights = list(transformer.parameters())
    own = weights[0].dtype
    if choose_precision(precision, weights[0].device) != "bfloat16" or own != torch.float32:
        return Ready(transformer.blocks(), own)
    made = _READY.setdefault(transformer, {})
    state = tuple((id(weight), weight.data_ptr(), _changes(weight)) for weight in weights)
    if torch.bfloat16 not in made or made[torch.bfloat16][0] != state:
        made[torch.bfloat16] = state, Ready([to_bfloat16(block) for block in transformer.blocks()], torch.bfloat16)
    return made[torch.bfloat16][1]


def _changes(weight: Tensor) -> int:
    """How often a weight was written to; one made in inference mode cannot be written to outside of it."""
    return -1 if weight.is_inference() else weight._version


@torch.no_grad()
def to_bfloat16(block: ResidualAttentionBlock) -> ResidualAttentionBlock:
    """A copy whose linear layers are bfloat16 and the rest float32, without gradients."""
    block = copy.deepcopy(block).eval().requires_grad_(False)
    _fold_quick_gelu(block.mlp)
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            layer.to(torch.bfloat16)
    return block


def _fold_quick_gelu(mlp: MLP) -> None:
    """silu(1.702 x) / 1.702 with both factors moved into the weights, before those are rounded."""
    if type(mlp.gelu) is QuickGELU and type(mlp.c_fc) is type(mlp.c_proj) is nn.Linear:
        mlp.c_fc.weight.mul_(1.702)
        mlp.c_fc.bias.mul_(1.702)
        mlp.c_proj.weight.div_(1.702)
        mlp.gelu = nn.SiLU(inplace=True)
