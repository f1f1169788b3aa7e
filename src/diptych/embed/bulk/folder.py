"""Parts of a folder of features as Parquet, Arrow or .npy, and a finished folder read back."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from diptych import files
from diptych.embed.bulk.config import Format
from diptych.errors import NotFoundError, UsageError
from diptych.stage.folder import MANIFEST_FILE, read_begun, read_manifest

STAGE = "embed"
"""Name of the stage in the manifest."""


class Features(NamedTuple):
    """What `diptych embed` wrote, in the order of the inputs."""

    ids: list[str]
    sources: list[str]
    features: Float[np.ndarray, "N E"]


def load_features(folder: str | Path) -> Features:
    """Read all parts of a finished folder.

    Raises NotFoundError for a folder that is none, UsageError for one that is not finished or damaged.
    """
    folder = Path(folder)
    begun = read_begun(folder)
    if begun is None or begun["stage"] != STAGE:
        raise NotFoundError(f"no features in {folder}: it has no {MANIFEST_FILE} that `diptych embed` wrote")
    try:
        manifest = read_manifest(folder)
    except NotFoundError as error:
        raise UsageError(str(error)) from None
    parts: list[Features] = []
    for name, digest in manifest.files.items():
        if not (folder / name).is_file() or files.sha256(folder / name) != digest:
            raise UsageError(f"{folder / name} is not what was written; start the same `diptych embed` again")
        if (read := _READERS.get(Path(name).suffix)) is not None:
            parts.append(read(folder / name))
    ids = [row_id for part in parts for row_id in part.ids]
    sources = [source for part in parts for source in part.sources]
    return Features(ids, sources, np.concatenate([part.features for part in parts]))


def write_features(
    folder: Path, name: str, format: Format, source: str, ids: list[str], features: Float[np.ndarray, "N E"]
) -> list[str]:
    """Write one part atomically; the names of its files."""
    file = f"{name}.{format}"
    if format == "npy":
        lines = (json.dumps({"id": row_id, "source": source}, ensure_ascii=False) + "\n" for row_id in ids)
        files.write_bytes(folder / f"{name}.ids.jsonl", "".join(lines).encode())
        with files.atomic_file(folder / file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, features)
        return [file, f"{name}.ids.jsonl"]
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(features.reshape(-1), pa.from_numpy_dtype(features.dtype)), features.shape[1]
    )
    sources = pa.DictionaryArray.from_arrays(np.zeros(len(ids), dtype=np.int32), [source])
    table = pa.table({"id": pa.array(ids, pa.string()), "source": sources, "feature": vectors})
    with files.atomic_file(folder / file) as temporary, open(temporary, "wb") as handle:  # Arrow takes names in UTF-8
        if format == "parquet":
            pq.write_table(table, handle, compression="zstd", compression_level=1)
        else:
            with pa.ipc.new_file(handle, table.schema) as writer:
                writer.write_table(table)
    return [file]


def _read_npy(path: Path) -> Features:
    with open(path.with_suffix(".ids.jsonl"), encoding="utf-8", newline="\n") as lines:
        rows = [files.parse_json(line) for line in lines]
    return Features([row["id"] for row in rows], [row["source"] for row in rows], np.load(path))


def _read_parquet(path: Path) -> Features:
    with open(path, "rb") as file:
        return _split(pq.read_table(file))


def _read_arrow(path: Path) -> Features:
    with pa.memory_map(os.fsencode(path)) as source:  # as text, Arrow takes names in UTF-8 only
        return _split(pa.ipc.open_file(source).read_all())


def _split(table: pa.Table) -> Features:
    vectors = table.column("feature").combine_chunks()
    features = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
    return Features(table.column("id").to_pylist(), table.column("source").to_pylist(), features)


_READERS: dict[str, Callable[[Path], Features]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".npy": _read_npy,
}
