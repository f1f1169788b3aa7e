"""How exactly a model is used: what a precision's name means here, and blocks of a tower made ready for it.

`exact` is the weights as they are. `float32` is a copy that lies, on a CPU, in the order in which oneDNN multiplies it.
`bfloat16` is such a copy whose products are computed in bfloat16 (8 bits of mantissa); what is added up over many
layers, the residual stream and LayerNorm, stays float32, and so do embeddings and projections.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import unknown_name
from diptych.model import operators
from diptych.model.config import PRECISIONS, Precision
from diptych.model.transformer import MLP, QuickGELU, ResidualAttentionBlock, TanhGELU, Transformer

Made = TypeVar("Made")
Resolved = Literal["exact", "float32", "bfloat16", "int8"]

_State = tuple[tuple[int, int, int], ...]
_MADE: WeakKeyDictionary[nn.Module, dict[object, tuple[_State, Any]]] = WeakKeyDictionary()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied faster than float32: by a GPU or a CPU with instructions for it.

    The processor is asked, not the clock, so the answer is the same every time.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return device.type == "xpu"
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)


def choose_precision(precision: Precision, device: torch.device) -> Resolved:
    """What `auto` means on a device; any other precision is itself."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision


def choose_text_precision(precision: Precision, device: torch.device) -> Resolved:
    """The same for texts: int8 is for pictures, so for texts it is what auto is."""
    return choose_precision("auto" if precision == "int8" else precision, device)


def make_once(tower: nn.Module, key: object, make: Callable[[], Made]) -> Made:
    """What is made of a tower's weights: kept as long as the tower, made again when a weight was changed, moved or
    replaced. A change through `.data`, which PyTorch does not count, is not seen."""
    made = _MADE.setdefault(tower, {})
    state = tuple((id(weight), weight.data_ptr(), _changes(weight)) for weight in tower.parameters())
    state += tuple((id(buffer), buffer.data_ptr(), _changes(buffer)) for buffer in tower.buffers())
    if key not in made or made[key][0] != state:
        made[key] = state, make()
    return made[key][1]


def _changes(weight: Tensor) -> int:
    """How often a weight was written to; one made in inference mode cannot be written to outside of it."""
    return -1 if weight.is_inference() else weight._version


class Ready(NamedTuple):
    """The blocks of a tower, ready for inference: they are given inputs of `dtype`."""

    blocks: list[ResidualAttentionBlock]
    dtype: torch.dtype


def get_ready(transformer: Transformer, precision: Precision) -> Ready:
    """The blocks of a text tower in a precision."""
    own = next(transformer.parameters())
    resolved = choose_text_precision(precision, own.device)
    dtype = torch.bfloat16 if resolved == "bfloat16" else torch.float32
    if resolved == "exact" or own.dtype != torch.float32 or (dtype == torch.float32 and own.device.type != "cpu"):
        return Ready(transformer.blocks(), own.dtype)
    return make_once(
        transformer, dtype, lambda: Ready([lower_block(block, dtype) for block in transformer.blocks()], dtype)
    )


@torch.no_grad()
def lower_block(block: ResidualAttentionBlock, dtype: torch.dtype) -> ResidualAttentionBlock:
    """A copy whose products are of a type and the rest float32, without gradients."""
    block = copy.deepcopy(block).eval().requires_grad_(False)
    fold_quick_gelu(block.mlp)
    joined = _activation_that_joins(block.mlp)
    for layer in list(block.modules()):
        for name, child in layer.named_children():
            if type(child) is nn.Linear:
                setattr(layer, name, lower(child, dtype, joined if child is block.mlp.c_fc else "none"))
    if joined != "none" and isinstance(block.mlp.c_fc, PackedLinear):
        block.mlp.gelu = nn.Identity()
    return block


def fold_quick_gelu(mlp: MLP) -> None:
    """silu(1.702 x) / 1.702 with both factors moved into the weights, before those are rounded."""
    if type(mlp.gelu) is QuickGELU and type(mlp.c_fc) is type(mlp.c_proj) is nn.Linear:
        mlp.c_fc.weight.mul_(1.702)
        mlp.c_fc.bias.mul_(1.702)
        mlp.c_proj.weight.div_(1.702)
        mlp.gelu = nn.SiLU(inplace=True)


def _activation_that_joins(mlp: MLP) -> str:
    """oneDNN's name of the activation, which it computes while the product is still in the cache."""
    return {nn.SiLU: "swish", nn.GELU: "gelu", TanhGELU: "gelu_tanh"}.get(type(mlp.gelu), "none")


class PackedLinear(nn.Module):
    """A linear layer on a CPU, then an activation; its weight lies as oneDNN multiplies it.

    Packed once instead of in every call: in bfloat16 a tenth of the time for 1,600 rows, two fifths for the 50 of one
    picture. In float32 oneDNN is also twice as quick as MKL on processors of AMD.
    """

    def __init__(
        self,
        weight: Float[Tensor, "M K"],
        bias: Float[Tensor, " M"] | None,
        dtype: torch.dtype,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.packed = operators.pack(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return operators.multiply_packed(x, self.packed, self.bias, self.activation)


def lower(linear: nn.Linear, dtype: torch.dtype, activation: str = "none") -> nn.Module:
    """A linear layer of a type: packed where oneDNN has it (which then also computes the activation)."""
    if linear.weight.device.type == "cpu" and operators.can_pack(dtype):
        return PackedLinear(linear.weight, linear.bias, dtype, activation)
    return linear.to(dtype)
