"""Which tensors a model is made of, in a file of weights of any format: found, renamed, not yet read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from diptych import files
from diptych.checkpoint.weights.archive import read_archive
from diptych.checkpoint.weights.tensors import TensorFile, open_file, read_safetensors, read_shards, short
from diptych.errors import CheckpointError

_TRAINING_PARTS = frozenset({"module", "_orig_mod"})
"""Parts of a name that DistributedDataParallel and torch.compile add."""
_NOT_WEIGHTS = frozenset(
    {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "epoch", "step"}
)


def read_tensor_file(path: Path) -> TensorFile:
    """Look into a file of weights, whatever its format: safetensors, its index of shards, or a torch.save archive."""
    if path.name.endswith(".index.json"):
        return read_shards(path)
    with open_file(path) as file:
        magic = file.read(512)
    if magic[:4] == b"PK\x03\x04":
        return read_archive(path)
    if magic[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(f"{path} holds no weights: {_what_it_is(magic)}")


def _what_it_is(magic: bytes) -> str:
    if not magic:
        return "it is empty"
    if magic.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself (git lfs pull)"
    if magic.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably an error that was saved under this name"
    if magic[:1] == b"\x80":
        return (
            "it is a bare pickle, as torch.save wrote before PyTorch 1.6; load it where it comes from and save it "
            "again as safetensors"
        )
    return "it is neither safetensors nor an archive of torch.save (a truncated or foreign file?)"


class Source(NamedTuple):
    """Where one of our tensors comes from, or goes to."""

    names: tuple[str, ...]
    """In the file; several are joined along the first axis (q, k, v)."""
    transpose: bool = False
    """A projection that the file holds as nn.Linear does, output first."""
    axes: int = 0
    """Axes of length 1 that the file has before ours (timm's class token is [1, 1, D])."""
    shares: tuple[int, ...] = ()
    """How the first axis is divided among several names; by default in equal parts."""

    def take(self, parts: list[Tensor]) -> Tensor:
        """The file's tensors -> ours."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.axes:
            tensor = tensor.reshape(tensor.shape[self.axes :])
        return tensor.T.contiguous() if self.transpose else tensor

    def give(self, tensor: Tensor) -> dict[str, Tensor]:
        """Ours -> the file's."""
        if self.transpose:
            tensor = tensor.T
        tensor = tensor.reshape((1,) * self.axes + tensor.shape)
        if len(self.names) == 1:
            return {self.names[0]: tensor.contiguous()}
        shares = self.shares or (1,) * len(self.names)
        sizes = [len(tensor) * share // sum(shares) for share in shares]
        return {name: part.contiguous() for name, part in zip(self.names, tensor.split(sizes), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors of a file under our names, not yet read."""

    file: TensorFile
    sources: Mapping[str, Source]
    xxh3: str | None = None
    """XXH3 of the whole file, if the checkpoint says so; checked in the same pass that reads it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, as it will be."""
        return {name: self._shape(source) for name, source in self.sources.items()}

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """Count of numbers in the file by type, counters (`num_batches_tracked`) left out."""
        counts: dict[torch.dtype, int] = {}
        for name in (part for source in self.sources.values() for part in source.names):
            entry = self.file.entries[name]
            if entry.dtype.is_floating_point:
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
        return counts

    def read(self, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """Read all of them, floating ones as `dtype` (None: as they are), and hold the file to its hash."""
        digest = xxhash.xxh3_128() if self.xxh3 else None
        names = None if digest else [name for source in self.sources.values() for name in source.names]
        tensors = self.file.read(names, dtype, digest)
        if digest is not None and digest.hexdigest() != self.xxh3:
            raise damaged(self.file.paths[0])
        return {name: _take(tensors, source) for name, source in self.sources.items()}

    def check_hash(self) -> None:
        """Raise CheckpointError if the file is not what was written; without a known hash, nothing happens."""
        if self.xxh3 and files.xxh3(self.file.paths[0]) != self.xxh3:
            raise damaged(self.file.paths[0])

    def _shape(self, source: Source) -> tuple[int, ...]:
        shapes = [self.file.entries[name].shape for name in source.names]
        if len(shapes) > 1:
            if len({shape[1:] for shape in shapes}) > 1 or not shapes[0]:
                raise CheckpointError(
                    f"{self.file.paths[0]}: {short(source.names)} have shapes that do not fit together"
                )
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if any(size != 1 for size in shapes[0][: source.axes]) or len(shapes[0]) < source.axes:
            return (-1,)  # what no tensor has
        shape = shapes[0][source.axes :]
        return shape[::-1] if source.transpose else shape


def damaged(file: Path) -> CheckpointError:
    """The error for a file whose hash does not fit."""
    return CheckpointError(f"{file} is damaged: its bytes are not those that were written")


def clean_names(file: TensorFile, where: Path) -> dict[str, str]:
    """Names without the wrappers of training -> names in the file; what is no weight is left out.

    A model that is a part of another module (Lightning's `model.`, `clip_model.`) is known by its one temperature.
    """
    plain = {given: ".".join(p for p in given.split(".") if p not in _TRAINING_PARTS) for given in file.entries}
    scales = [name for name in plain.values() if f".{name}".endswith(".logit_scale")]
    prefix = scales[0].removesuffix("logit_scale") if len(scales) == 1 else ""
    names: dict[str, str] = {}
    for given, name in plain.items():
        if name.split(".")[-1] in _NOT_WEIGHTS:
            continue
        name = name.removeprefix(prefix)
        if name in names:
            raise CheckpointError(f"{where} holds {short(name)} twice, as {short(names[name])} and {short(given)}")
        names[name] = given
    return names


def find_weights(folder: Path, names: Sequence[str], config: str) -> Path:
    """The first of these files that is there, beside its config."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} is incomplete: beside {config} there is none of {', '.join(names)}")


def _take(tensors: dict[str, Tensor], source: Source) -> Tensor:
    return source.take([tensors.pop(name) for name in source.names])  # popped, to be freed as the model grows
