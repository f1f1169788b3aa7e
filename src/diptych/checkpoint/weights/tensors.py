"""Files of weights, read as data: names, types and shapes first, the bytes only when they are asked for.

A file is trusted with nothing. Its header is bounded, every tensor must lie inside the file, and what is asked of
memory is what the file itself holds. This module knows safetensors; `archive` makes the same of torch.save's files.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diptych import files
from diptych.errors import CheckpointError, NotFoundError

MAX_HEADER = 8 << 20
"""Bytes of a safetensors header or a pickle; the largest CLIP models need a twentieth of it."""
MAX_JSON = 8 << 20
"""Bytes of a JSON file beside the weights; the largest, a tokenizer, takes 2 MB."""
_BLOCK = 1 << 20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@runtime_checkable
class Digest(Protocol):
    """A hash that is fed as the file is read."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: what it is and where it lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Start of the tensor's storage, bytes from the beginning of the file."""
    nbytes: int
    """Bytes of the tensor's storage, which other tensors may share."""
    offset: int = 0
    """Place of the tensor's first element in the storage, elements."""
    stride: tuple[int, ...] | None = None
    """Elements; None: contiguous."""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """Tensors by name, in one file or in several shards."""

    paths: tuple[Path, ...]
    entries: Mapping[str, Entry]
    classes: Mapping[str, str] = field(default_factory=dict)
    """Classes in a TorchScript archive: module path -> name of its class. Evidence, never executed."""

    def read(
        self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None, digest: Digest | None = None
    ) -> dict[str, Tensor]:
        """Read tensors, all by default, into memory of their own; floating ones converted to `dtype`.

        A `digest` is fed with every byte of the file, in the same pass: only for all tensors of a single safetensors
        file, whose bytes follow each other without gaps.
        """
        names = self.entries.keys() if names is None else names
        by_file: dict[Path, dict[tuple[int, int], list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in names:
            entry = self.entries[name]
            by_file[entry.path][entry.start, entry.nbytes].append(name)
        tensors: dict[str, Tensor] = {}
        for path, storages in by_file.items():
            with open_file(path) as file:
                if digest is not None:
                    digest.update(file.read(min(start for start, _ in storages)))
                for (start, nbytes), sharing in sorted(storages.items()):
                    storage = _read_storage(file, start, nbytes, digest, path)
                    for name in sharing:
                        tensors[name] = _view(storage, self.entries[name], dtype, alone=len(sharing) == 1)
        return tensors

    def map(self) -> dict[str, Tensor]:
        """All tensors as views of their file, a safetensors file: what is not touched is not read.

        They are for copying from, soon: a change is not written back; a file that shrinks meanwhile ends the process.
        """
        tensors = {}
        for path in self.paths:
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            for name, entry in self.entries.items():
                if entry.path == path:
                    storage = mapped[entry.start : entry.start + entry.nbytes]
                    if entry.start % entry.dtype.itemsize:  # as older writers left it
                        storage = storage.clone()
                    tensors[name] = storage.view(entry.dtype).view(entry.shape)
        return tensors


def read_safetensors(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Stricter than the format asks: no key twice, no unknown type, tensors in the file without gap or overlap up to
    its last byte.
    """
    with open_file(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is damaged: its header claims {length} bytes; at most {MAX_HEADER} and the file's {size}"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    entries = {name: _safetensors_entry(name, fields, path, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise CheckpointError(
                f"{path} is damaged: {short(name)} begins at byte {entry.start}, the tensor before it ends at {end}"
            )
        end = entry.start + entry.nbytes
    if end != size:
        raise CheckpointError(f"{path} is damaged: its tensors end at byte {end}, the file at {size}")
    return TensorFile((path,), entries)


def _safetensors_entry(name: str, fields: Any, path: Path, start: int) -> Entry:
    match fields:
        case {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]} if len(fields) == 3:
            sound = all(is_count(number) for number in (*shape, begin, end))
        case _:
            dtype, shape, begin, end, sound = None, [], 0, 0, False
    if not sound:
        raise CheckpointError(f"{path} is damaged: its header does not describe {short(name)} as safetensors do")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {short(name)} has type {short(dtype)}; read are {', '.join(_DTYPES)}")
    entry = Entry(path=path, dtype=_DTYPES[dtype], shape=tuple(shape), start=start + begin, nbytes=max(0, end - begin))
    if len(shape) > 8 or entry.numel * entry.dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path} is damaged: {short(name)} has shape {short(shape)} of {dtype}, but {short(end - begin)} bytes"
        )
    return entry


def read_shards(index: Path) -> TensorFile:
    """Several safetensors files that an index holds together."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map")
    shards: dict[str, TensorFile] = {}
    for name in weight_map.values():
        if name not in shards:
            shards[name] = read_safetensors(beside(index, name))
    entries: dict[str, Entry] = {}
    for file in shards.values():
        if repeated := entries.keys() & file.entries.keys():
            raise CheckpointError(f"{index}: {short(min(repeated))} is in two files")
        entries |= file.entries
    if entries.keys() != weight_map.keys():
        odd = min(entries.keys() ^ weight_map.keys())
        raise CheckpointError(f"{index} does not fit its files: {short(odd)} is in only one of them")
    return TensorFile(tuple(file.paths[0] for file in shards.values()), entries)


# --- reading bytes --------------------------------------------------------------------------------------------------


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file unbuffered; anything else (a pipe would never end) is refused."""
    if not path.exists():
        raise NotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def beside(path: Path, name: object) -> Path:
    """A file named by a file beside it: a plain name, no way out of the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise CheckpointError(f"{path} names the file {short(name)}; only names in its own folder are followed")
    return path.parent / name


def _read_storage(file: IO[bytes], start: int, nbytes: int, digest: Digest | None, path: Path) -> Tensor:
    storage = torch.empty(nbytes, dtype=torch.uint8)
    target = memoryview(storage.numpy())  # pyright: ignore[reportArgumentType]
    file.seek(start)
    for begin in range(0, nbytes, _BLOCK):
        block = target[begin : begin + _BLOCK]
        filled = 0
        while filled < len(block):
            count = file.readinto(block[filled:])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise CheckpointError(f"{path} ended while it was read: something is still writing it")
            filled += count
        if digest is not None:
            digest.update(block)  # while the block is in the processor's cache
    return storage


def _view(storage: Tensor, entry: Entry, dtype: torch.dtype | None, *, alone: bool) -> Tensor:
    tensor = storage.view(entry.dtype) if entry.nbytes else storage.new_empty(0, dtype=entry.dtype)
    if entry.stride is None:
        tensor = tensor[entry.offset : entry.offset + entry.numel].view(entry.shape)
    else:
        tensor = tensor.as_strided(entry.shape, entry.stride, entry.offset)
    if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
        return tensor.to(dtype).contiguous()
    owns_it = alone and tensor.numel() * tensor.itemsize == entry.nbytes
    return tensor.contiguous() if owns_it else tensor.clone(memory_format=torch.contiguous_format)


# --- JSON of unknown origin ------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of unknown origin: bounded, no key twice, no NaN."""
    with open_file(path) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{path} has more than {MAX_JSON} bytes; that is no description of a model")
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """`read_json` of bytes that are already there; `path` is for the message."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def bounded(digits: str) -> int:
        if len(digits) > 300:  # beyond every float; 1e30 stands in tokenizers of transformers
            raise ValueError(f"{digits[:20]}... is a number of {len(digits)} digits")
        return int(digits)

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{short(twice)} is there twice")
        return result

    try:
        text = data.decode("utf-8")
        value = files.parse_json(text, object_pairs_hook=once, parse_constant=refuse, parse_int=bounded)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {short(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: its JSON is no object")
    return value


def is_count(value: object) -> bool:
    """A size or an offset: a plain integer from 0 to 2^62."""
    return type(value) is int and 0 <= value < 1 << 62


def short(value: object) -> str:
    """A value of unknown origin for a message: one line, not too long, no control characters."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:
        text = "a huge number"
    text = "".join(sign if sign.isprintable() else "?" for sign in text[:200])
    return text if len(text) <= 80 else text[:77] + "..."
