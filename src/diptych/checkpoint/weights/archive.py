"""Archives of torch.save and TorchScript, read as data.

Both are zip files of stored (not compressed) members: `data.pkl` describes the objects, `data/0`, `data/1`, ... are
raw storages. A TorchScript archive also holds code, which is never looked at; the names of its modules' classes are
kept, since they tell QuickGELU from GELU.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from diptych.checkpoint.weights.pickles import Call, Global, Instance, Storage, read_pickle
from diptych.checkpoint.weights.tensors import MAX_HEADER, Entry, TensorFile, is_count, open_file, short
from diptych.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_VISITS = 200_000
_MAX_DEPTH = 64

_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Under which key training scripts keep the weights."""


def read_archive(path: Path) -> TensorFile:
    """Find the tensors of an archive: a state dict, one inside a training wrapper, or a TorchScript module."""
    with open_file(path) as file:
        members = _Members(path, file)
        root = read_pickle(members.read("data.pkl"), str(path))
        classes: dict[str, str] = {}
        if isinstance(root, Instance):
            named = dict(_walk_module(root, classes, path))
        else:
            state = _unwrap(root) if isinstance(root, dict) else {}
            named = {name: value for name, value in state.items() if isinstance(name, str)}
        entries = {
            name: members.entry(name, call)
            for name, value in named.items()
            if (call := _tensor_call(value)) is not None
        }
        if not entries:
            raise CheckpointError(f"{path} holds no tensors by name; a state dict or a TorchScript model is needed")
        used = {(entry.start, entry.nbytes) for entry in entries.values()}
        if sum(nbytes for _, nbytes in used) > members.size:
            raise CheckpointError(f"{path} is damaged: its members overlap")
        claimed = sum(entry.numel * entry.dtype.itemsize for entry in entries.values())
        if claimed > 2 * members.size:  # some tied weights share a storage, and each gets memory of its own
            raise CheckpointError(
                f"{path} is refused: its tensors share storages and would take {claimed:,} bytes, the file has "
                f"{members.size:,}"
            )
    return TensorFile((path,), entries, classes)


def check_crc(path: Path) -> None:
    """Read every member once and hold it to its CRC-32."""
    with open_file(path) as file:
        members = _Members(path, file)
        for name, info in members.infos.items():
            if name.endswith((".pkl", "byteorder", "version")) or "data/" in name:
                members.check_crc(info)


class _Members:
    """The members of a zip archive that torch wrote, each stored in one piece."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size
        try:
            with zipfile.ZipFile(_BoundedReader(file)) as archive:  # type: ignore[arg-type]
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, UnicodeError) as error:
            detail = short(str(error)) or type(error).__name__
            raise CheckpointError(
                f"{path} is damaged: no zip archive to its end, perhaps truncated ({detail})"
            ) from None
        pickles = [info.filename for info in infos if PurePosixPath(info.filename).name == "data.pkl"]
        self.infos: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            if ".." in info.filename.split("/") or info.filename.startswith("/") or "\\" in info.filename:
                raise CheckpointError(f"{path} is refused: it holds a member with the path {short(info.filename)}")
            if info.filename in self.infos:
                raise CheckpointError(f"{path} is refused: it holds {short(info.filename)} twice")
            self.infos[info.filename] = info
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save: {len(pickles)} data.pkl in it")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in self.infos and self.read("byteorder").strip() != b"little":
            raise CheckpointError(f"{path} was written on a machine with another byte order; convert it there")

    def read(self, name: str) -> bytes:
        """A small member, whole."""
        start, nbytes = self.locate(self.root + name)
        if nbytes > MAX_HEADER:
            raise CheckpointError(f"{self.path} is refused: its {name} has {nbytes} bytes, at most {MAX_HEADER}")
        return self._read_at(start, nbytes)

    def _read_at(self, start: int, nbytes: int) -> bytes:
        self.file.seek(start)
        return _read_up_to(self.file, nbytes)

    def locate(self, name: str) -> tuple[int, int]:
        """First byte in the file and number of bytes of a member."""
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} is damaged: {short(name)} is missing")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1:
            raise CheckpointError(
                f"{self.path} is refused: {short(name)} is compressed or encrypted; torch stores plainly"
            )
        inside = 0 <= info.header_offset < self.size
        header = self._read_at(info.header_offset, _LOCAL_HEADER.size) if inside else b""
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.path} is damaged: {short(name)} is not where the archive says")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + info.file_size > self.size:
            raise CheckpointError(f"{self.path} is damaged: {short(name)} reaches beyond the end of the file")
        return start, info.file_size

    def check_crc(self, info: zipfile.ZipInfo) -> None:
        start, nbytes = self.locate(info.filename)
        self.file.seek(start)
        crc = 0
        while nbytes and (block := self.file.read(min(nbytes, 1 << 20))):
            crc = zlib.crc32(block, crc)
            nbytes -= len(block)
        if nbytes or crc != info.CRC:
            raise CheckpointError(f"{self.path} is damaged: the check sum of {short(info.filename)} does not fit")

    def entry(self, name: str, call: Call) -> Entry:
        """Hold what the pickle says of a tensor against the storage that is there."""
        storage, offset, shape, stride, dtype = _tensor_arguments(call)
        if storage is None:
            raise CheckpointError(f"{self.path} is refused: {short(name)} is a tensor of an unknown kind")
        start, nbytes = self.locate(f"{self.root}data/{storage.key}")
        held = nbytes // dtype.itemsize
        claimed = storage.numel * (1 if storage.type.name == "UntypedStorage" else dtype.itemsize)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        entry = Entry(
            path=self.path, dtype=dtype, shape=shape, start=start, nbytes=nbytes, offset=offset, stride=stride
        )
        empty = 0 in shape
        if claimed != nbytes or nbytes % dtype.itemsize or (not empty and (last >= held or entry.numel > held)):
            raise CheckpointError(
                f"{self.path} is damaged: {short(name)} claims shape {short(shape)} in a storage of {nbytes} bytes"
            )
        return entry


class _BoundedReader:
    """A file for zipfile, which reads a whole central directory at once: not one of any size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        most = MAX_HEADER if count < 0 else count
        data = _read_up_to(self._file, min(most, MAX_HEADER))
        if most > MAX_HEADER or (count < 0 and self._file.read(1)):
            raise ValueError(f"a table of contents of more than {MAX_HEADER} bytes")
        return data

    def seekable(self) -> bool:
        return True


def _read_up_to(file: IO[bytes], count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (block := file.read(count - len(data))):
        data += block
    return bytes(data)


def _unwrap(root: dict[Any, Any]) -> dict[Any, Any]:
    """The state dict inside what a training script saved."""
    for _ in range(3):
        inner = next((root[key] for key in _WRAPPERS if isinstance(root.get(key), dict)), None)
        if inner is None:
            break
        root = inner
    return root


def _walk_module(module: Instance, classes: dict[str, str], path: Path) -> Iterator[tuple[str, Any]]:
    """Every attribute of a TorchScript module and its submodules by its path, their classes noted on the way."""
    waiting: list[tuple[str, Instance]] = [("", module)]
    letters = 0
    for _ in range(_MAX_VISITS):
        if not waiting:
            return
        prefix, module = waiting.pop()
        classes[prefix.rstrip(".")] = module.cls.name
        if prefix.count(".") > _MAX_DEPTH:
            break
        for name, value in module.state.items():
            letters += len(prefix) + len(str(name))
            if letters > MAX_HEADER:
                raise CheckpointError(f"{path} is refused: the names of its tensors have over {MAX_HEADER} letters")
            if isinstance(value, Instance):
                waiting.append((f"{prefix}{name}.", value))
            else:
                yield prefix + str(name), value
    raise CheckpointError(f"{path} is refused: its modules are nested without end")


def _tensor_call(value: Any) -> Call | None:
    """The call that rebuilds a tensor, if `value` is one; a parameter is the tensor in it."""
    for _ in range(4):
        if not isinstance(value, Call):
            return None
        if value.function.name.startswith("_rebuild_tensor"):
            return value
        if value.function.name == "_rebuild_parameter" and value.arguments:
            value = value.arguments[0]
        else:
            return None
    return None


def _tensor_arguments(
    call: Call,
) -> tuple[Storage | None, int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    nothing = None, 0, (), (), torch.float32
    match call.arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(stride), *more):
            pass
        case _:
            return nothing
    dtype = _STORAGE_TYPES.get(storage.type.name)
    if call.function.name == "_rebuild_tensor_v3":
        kind = more[2] if len(more) > 2 else None
        dtype = getattr(torch, kind.name, None) if isinstance(kind, Global) else None
    sound = all(is_count(n) for n in (offset, storage.numel, *shape, *stride))
    if not isinstance(dtype, torch.dtype) or not sound or len(shape) != len(stride) or len(shape) > 8:
        return nothing
    return storage, offset, shape, stride, dtype
