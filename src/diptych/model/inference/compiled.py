"""Functions of rows, compiled once a machine and kept on disk: the second process loads them in milliseconds.

Worth it for chains of small operations, which PyTorch would otherwise run one by one over the whole tensor. Where
nothing compiles (there is no C++ compiler), the function itself is used; it computes the same.
"""

import hashlib
import inspect
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from diptych import files
from diptych.model.operators import compiling_ahead, mark_rows

Given = ParamSpec("Given")
Result = TypeVar("Result")


def compile_rows(
    function: Callable[Given, Result], examples: Sequence[Tensor | float | str]
) -> Callable[Given, Result]:
    """A function of tensors, compiled for any number of rows above one, to be called in inference mode.

    Of `examples`, arguments as they will be given, those tensors have rows that have more than one dimension; all other
    sizes are as in the examples.
    """
    path = files.cache_folder("compiled") / f"{_name(function, examples)}.bin"
    if _is_ours(path):
        try:
            with open(path, "rb") as file:
                return _unguarded(torch.compiler.load_compiled_function(file))
        except Exception:  # cut off, or of another build: it is made anew
            path.unlink(missing_ok=True)
    try:
        return _compile(function, examples, path)
    except Exception as error:  # whatever a compiler may lack: what it was to be made from still works
        warnings.warn(f"{function.__name__} runs uncompiled, which is slow: {_first_line(error)}", stacklevel=2)
        return function


def _is_ours(path: Path) -> bool:
    """Whether a file is there and we made it: it is a program, and is run."""
    return path.exists() and (not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid())


@torch.inference_mode()
def _compile(
    function: Callable[Given, Result], examples: Sequence[Tensor | float | str], path: Path
) -> Callable[Given, Result]:
    rows = [example.clone() if isinstance(example, Tensor) else example for example in examples]
    for tensor in rows:
        if isinstance(tensor, Tensor) and tensor.ndim > 1:
            mark_rows(tensor)
    with compiling_ahead():
        compiled = torch.compile(function, fullgraph=True).aot_compile((tuple(rows), {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as temporary:
        compiled.save_compiled_function(str(temporary))
    return _unguarded(compiled)


def _unguarded(compiled: Callable[Given, Result]) -> Callable[Given, Result]:
    """Our callers give what the examples were like, which costs as much to check as a small function to run."""
    compiled.disable_guard_check()  # type: ignore[attr-defined]
    return compiled


def _name(function: Callable[..., object], examples: Sequence[Tensor | float | str]) -> str:
    """What the compiled code depends on: PyTorch, the processor, the source, the shapes."""
    shapes = [
        (str(e.dtype), e.ndim, tuple(e.shape[1:] if e.ndim > 1 else e.shape)) if isinstance(e, Tensor) else e
        for e in examples
    ]
    source = inspect.getsource(inspect.getmodule(function) or function)
    parts = [torch.__version__, platform.machine(), sorted(torch.cpu.get_capabilities().items()), source, shapes]
    return f"{function.__name__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
