"""Files of tensors, written: safetensors, by one process or by every rank of a job, to the same bytes.

FSDP2 shards along the rows, so that a rank's part of a tensor is one run of bytes in the file. The first rank writes
the header (`make_file`), then all write at once (`write_parts`), and nothing is sent, joined or held twice. All ranks
must see the file. docs/scaling.md compares the other ways.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from diptych.checkpoint.weights.tensors import Entry, read_safetensors
from diptych.errors import CheckpointError, DiptychError
from diptych.machine import open_file, write_at
from diptych.ranks import Ranks

Result = TypeVar("Result")
ALONE = Ranks()

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order of the file: the types that need the strictest alignment come first."""
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device, byte for byte as `safetensors.torch.save_file` does."""
    make_file(path, tensors, metadata)
    write_parts(path, tensors)


def make_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the header for tensors, of which only names, types and shapes are looked at, and zeros in their places."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name.encode())):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_parts(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Put this rank's rows into a file that `make_file` made; the first rank also writes whatever is not sharded."""
    parts = {name: tensor for name, tensor in tensors.items() if ranks.is_first or isinstance(tensor, DTensor)}
    if not parts:
        return
    entries = read_safetensors(path).entries
    descriptor = open_file(path, os.O_WRONLY)  # not for reading too: no byte but our own may go out with a page
    try:
        for name, tensor in parts.items():
            _write_at(descriptor, *_locate(tensor, entries[name], ranks))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def on_every(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do a part of a checkpoint's writing on every rank. What fails on one fails on all, so that none waits for it."""
    caught, result = None, None
    try:
        result = action()
    except Exception as error:
        caught = error
    failures = ranks.gather_objects(caught if caught is None else str(caught))
    if caught is not None and (ranks.world_size == 1 or not isinstance(caught, OSError | DiptychError)):
        raise caught
    for rank, why in enumerate(failures):
        if why is not None:
            raise CheckpointError(
                f"rank {rank} of {ranks.world_size} could not write its part of a checkpoint: {why}; all machines must "
                "see the run's folder and have room there. Older checkpoints are whole: start the same command again"
            )
    return cast(Result, result)


def on_first(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do on the first rank alone what needs no other; its result, or its failure, on every rank."""
    return ranks.broadcast(on_every(ranks, action if ranks.is_first else lambda: None))


def _locate(tensor: Tensor, entry: Entry, ranks: Ranks) -> tuple[int, Tensor]:
    """The byte of the file where this rank's part of a tensor begins, and that part."""
    if not isinstance(tensor, DTensor):
        return entry.start, tensor
    assert tensor.placements == (Shard(0),), tensor.placements
    rows = -(-tensor.shape[0] // ranks.world_size)  # of all ranks but the last ones
    return entry.start + ranks.rank * rows * (entry.nbytes // tensor.shape[0]), tensor.to_local()


def _write_at(descriptor: int, start: int, tensor: Tensor) -> None:
    data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    write_at(descriptor, data, start)
