"""What PyTorch does not promise to keep: its private operators and switches, each with a plain form beside it.

An operator is called where its schema is the one known here, and elsewhere its plain form, or its owner does without.
Nothing else in the package reaches into `torch.ops` or `torch._...`; tests/model/test_operators.py holds both forms
against each other and names the versions of PyTorch that were tried.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 1600
"""Rows that the order of packed weights is chosen for: a batch of pictures, a trie of texts."""


def _is_known(schema: str) -> bool:
    """Whether an operator is there and takes and gives what we expect."""
    namespace, operator = schema.partition("(")[0].split("::")
    try:
        return str(getattr(getattr(torch.ops, namespace), operator).default._schema) == schema
    except (AttributeError, RuntimeError):
        return False


_SILU_BACKWARD = _is_known("aten::silu_backward(Tensor grad_output, Tensor self) -> Tensor")
_SOFTMAX_BACKWARD = _is_known(
    "aten::_softmax_backward_data(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor"
)
_PACK = _is_known("mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y") and _is_known(
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
HAS_INT8 = _is_known("onednn::qlinear_prepack(Tensor weight, int[]? x_shape) -> Tensor") and _is_known(
    "onednn::qlinear_pointwise(Tensor qx, float x_scale, int x_zero_point, Tensor qw, Tensor w_scale, "
    "Tensor w_zero_point, Tensor? bias, float output_scale, int output_zero_point, ScalarType? output_dtype, "
    "str post_op_name, Scalar?[] post_op_args, str post_op_algorithm) -> Tensor"
)
"""Whether 8-bit products are there. They exist for speed alone, so they have no plain form."""


# --- derivatives ----------------------------------------------------------------------------------------------------


def silu_backward(derivative: Tensor, x: Tensor) -> Tensor:
    """The derivative by x, of that by silu(x)."""
    if _SILU_BACKWARD:
        return torch.ops.aten.silu_backward(derivative, x)
    s = x.sigmoid()
    return derivative * (s * (1 + x * (1 - s)))


def softmax_backward(derivative: Tensor, p: Tensor) -> Tensor:
    """The derivative by scores, of that by p, their softmax along the last dimension."""
    if _SOFTMAX_BACKWARD:
        return torch.ops.aten._softmax_backward_data(derivative, p, -1, p.dtype)
    product = derivative.float() * p.float()
    return (product - p.float() * product.sum(dim=-1, keepdim=True)).to(p.dtype)


def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The length of each tensor."""
    if hasattr(torch, "_foreach_norm"):
        return torch._foreach_norm(list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor, in place."""
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]
        return
    for tensor in tensors:
        tensor.mul_(factor)


# --- oneDNN's products ------------------------------------------------------------------------------------------------


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, on a processor that it multiplies that type on; a small product is tried."""
    if not _PACK or not torch.backends.mkldnn.is_available():
        return False
    if dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    one = torch.ones(2, 16, dtype=dtype)
    try:
        return torch.allclose(multiply_packed(one, pack(one), None, "swish"), F.silu(one @ one.T), atol=0.1)
    except RuntimeError:
        return False


def pack(weight: Tensor) -> Tensor:
    """A weight [M, K] in the order in which oneDNN multiplies it; needs `can_pack`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x [R, K] by what `pack` made, then an activation by oneDNN's name of it."""
    name, _, form = activation.partition("_")
    algorithm = form or "none" if name == "gelu" else ""  # none: the exact one, by the error function
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def pack_int8(weight: Tensor) -> Tensor:
    """The same of an int8 weight; needs HAS_INT8."""
    return torch.ops.onednn.qlinear_prepack(weight, [_ROWS, weight.shape[1]])


def multiply_int8(
    rows: Tensor, zero: int, packed: Tensor, scale: Tensor, weight_zero: Tensor, dtype: torch.dtype
) -> Tensor:
    """(rows - zero) [R, K] by what `pack_int8` made, times the scale [M] of each output."""
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, zero, packed, scale, weight_zero, None, 1.0, 0, dtype, "none", [], ""
    )


# --- the compiler -----------------------------------------------------------------------------------------------------


def allow_shapes(count: int) -> None:
    """Let a function be compiled for so many shapes; PyTorch gives up after eight and runs it uncompiled."""
    if hasattr(config := torch._dynamo.config, "recompile_limit"):
        config.recompile_limit = max(config.recompile_limit, count)


def mark_rows(tensor: Tensor) -> None:
    """Compile for any number of rows of this tensor."""
    torch._dynamo.mark_dynamic(tensor, 0)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Let functions be compiled ahead and kept (2.11 has that switched off), to code that asks how many threads there
    are whenever it runs."""
    from torch._inductor import config  # a slow import that only compiling needs

    dynamo = torch._dynamo.config
    with ExitStack() as stack:
        if hasattr(dynamo, "enable_aot_compile"):
            stack.enter_context(dynamo.patch({"enable_aot_compile": True}))
        if hasattr(config.cpp, "dynamic_threads"):
            stack.enter_context(config.patch({"cpp.dynamic_threads": True}))
        yield
