"""Reading a folder of features back."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from diptych import files
from diptych.embed.bulk.folder import MANIFEST
from diptych.errors import NotFoundError, UsageError


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
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        counts = manifest.get("counts")
    except (OSError, ValueError, AttributeError):
        raise NotFoundError(f"no features in {folder}: it has no {MANIFEST} that `diptych embed` wrote") from None
    if counts is None:
        raise UsageError(f"{folder} is not finished; start the same `diptych embed` again and it goes on")
    ids: list[str] = []
    sources: list[str] = []
    parts: list[np.ndarray] = []
    for record in sorted((folder / "records").glob("*.json"), key=lambda path: int(path.stem)):
        found = json.loads(record.read_text())
        for name, about in found["files"].items():
            file = folder / "features" / name
            if not file.is_file() or files.xxh3(file) != about["xxh3"]:
                raise UsageError(f"{file} is not what was written; delete {record} and start `diptych embed` again")
        part = _read_part(folder / "features", next(iter(found["files"])))
        ids += part.ids
        sources += part.sources
        parts.append(part.features)
    if len(ids) != counts["features"]:
        raise UsageError(f"{folder} holds {len(ids)} features, not {counts['features']}; start `diptych embed` again")
    return Features(ids, sources, np.concatenate(parts))


def _read_part(folder: Path, name: str) -> Features:
    if name.endswith(".npy"):
        with open(folder / name.replace(".npy", ".ids.jsonl"), encoding="utf-8", newline="\n") as lines:
            rows = [json.loads(line) for line in lines]
        return Features([row["id"] for row in rows], [row["source"] for row in rows], np.load(folder / name))
    if name.endswith(".parquet"):
        table = pq.read_table(folder / name)
    else:
        with pa.memory_map(str(folder / name)) as source:
            table = pa.ipc.open_file(source).read_all()
    vectors = table.column("feature").combine_chunks()
    width = vectors.type.list_size
    features = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return Features(table.column("id").to_pylist(), table.column("source").to_pylist(), features)
