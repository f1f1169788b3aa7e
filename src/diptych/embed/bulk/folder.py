"""A folder of features on the disk: what it was made of, its parts, and what was left out.

    manifest.json            model, settings and inputs, written first; counts, once everything is done
    features/00000.parquet   id, source, feature of the rows of one part (or .arrow, or .npy with .ids.jsonl)
    records/00000.json       written last: the part is done; how many rows, which were left out and why, sizes, hashes
    skipped.jsonl            what was left out of all parts, once everything is done

Parts are ranges of the inputs and so the same whoever computes them. A part without its record, or whose files are
not as long as the record says, is computed anew.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float

from diptych import files
from diptych.config import to_dict
from diptych.embed.bulk.config import OutputConfig
from diptych.embed.sources import Source
from diptych.errors import UsageError

MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
FORMAT, VERSION = "diptych features", 1


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of one source."""

    number: int
    source: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def plan_parts(sources: Sequence[Source], part_rows: int) -> list[Part]:
    """Cut every source into ranges of at most `part_rows`."""
    parts: list[Part] = []
    for number, source in enumerate(sources):
        for start in range(0, source.rows, part_rows):
            parts.append(Part(len(parts), number, start, min(start + part_rows, source.rows)))
    return parts


class FeatureFolder:
    """Where the parts are written."""

    def __init__(self, path: Path, identity: Mapping[str, Any], output: OutputConfig) -> None:
        self.path, self.output = path, output
        self.identity = json.loads(json.dumps(identity))
        unmoved = self.identity | {"model": {k: v for k, v in self.identity["model"].items() if k != "source"}}
        self.identity_hash = xxhash.xxh3_128_hexdigest(json.dumps(unmoved, sort_keys=True).encode())

    def begin(self) -> None:
        """Claim the folder; raises UsageError if it holds features of another model, other settings or inputs.

        One that was claimed for others and holds no feature, because nothing could be used, is taken over.
        """
        manifest = self.path / MANIFEST
        different = find_difference(manifest, self.identity) if manifest.exists() else None
        if different and self._holds_features():
            raise UsageError(
                f"{self.path} holds features of {different}; name a new folder as --out, or do what was done then"
            )
        if not manifest.exists() and any(self.path.glob("[!.]*")):
            raise UsageError(f"{self.path} is not empty and holds no {MANIFEST}; name a new folder as --out")
        for folder in (self.path / "records", self.path / "features"):
            if different and folder.exists():  # before the manifest, so that a kill leaves what is taken over again
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(folder)
        if different:
            (self.path / SKIPPED).unlink(missing_ok=True)
        if different or not manifest.exists():
            files.write_json(manifest, self.identity)

    def _holds_features(self) -> bool:
        """Whether any part has features; a record that cannot be read may be of one."""
        for record in (self.path / "records").glob("*.json"):
            try:
                if json.loads(record.read_text())["features"]:
                    return True
            except (OSError, ValueError, KeyError, TypeError):
                return True
        return False

    def read_record(self, part: Part) -> dict[str, Any] | None:
        """What was written about a part; None if it is not done."""
        try:
            record = json.loads((self.path / "records" / f"{part.name}.json").read_text())
            if record["identity"] != self.identity_hash:
                return None
            for name, about in record["files"].items():
                if (self.path / "features" / name).stat().st_size != about["bytes"]:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def write_part(
        self,
        part: Part,
        source: str,
        ids: Sequence[str],
        features: Float[np.ndarray, "N E"],
        skipped: Sequence[tuple[str, str]],
    ) -> dict[str, Any]:
        """Write the features of a part and, once they are on the disk, its record."""
        array = features.astype(self.output.dtype)
        names = _WRITERS[self.output.format](self.path / "features", part.name, source, list(ids), array)
        about = {}
        for name in names:
            file = self.path / "features" / name
            about[name] = {"bytes": file.stat().st_size, "xxh3": files.xxh3(file)}
        record = {
            "identity": self.identity_hash,
            "source": source,
            "first": part.start,
            "inputs": part.stop - part.start,
            "features": len(ids),
            "skipped": [list(entry) for entry in skipped],
            "files": about,
        }
        files.write_json(self.path / "records" / f"{part.name}.json", record)
        return record

    def finish(self, sources: Sequence[Source], parts: Sequence[Part]) -> dict[str, Any]:
        """Add everything up, from the records alone; the counts, which go into the manifest."""
        reasons = Counter[str]()
        lines: list[str] = []
        features = 0
        for source in sources:
            for row_id, reason in source.lost:
                reasons[reason] += 1
                lines.append(_line(source.name, row_id, reason))
        for part in parts:
            record = self.read_record(part)
            assert record is not None, f"part {part.name} is not done"
            features += record["features"]
            for row_id, reason in record["skipped"]:
                reasons[reason] += 1
                lines.append(_line(record["source"], row_id, reason))
        inputs = sum(source.rows + len(source.lost) for source in sources)
        assert inputs == features + sum(reasons.values()), "every input has a feature or a reason"
        files.write_bytes(self.path / SKIPPED, "".join(lines).encode())
        counts = {"inputs": inputs, "features": features, "skipped": dict(sorted(reasons.items()))}
        files.write_json(self.path / MANIFEST, self.identity | {"counts": counts})
        return counts


def describe(model: Mapping[str, Any], output: OutputConfig, sources: Sequence[Source], **settings: Any) -> dict:
    """What makes a folder of features what it is: the manifest without the counts."""
    inputs = []
    first = 0
    for source in sources:
        parts = -(-source.rows // output.part_rows)
        entry: dict[str, Any] = {"source": source.name, "kind": source.kind, "rows": source.rows}
        entry |= {"fingerprint": source.fingerprint, "first_part": first, "parts": parts}
        if source.passed_over:
            entry["passed_over"] = source.passed_over
        inputs.append(entry)
        first += parts
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(model),
        "settings": to_dict(output) | settings,
        "inputs": inputs,
    }


def find_difference(manifest: Path, identity: Mapping[str, Any]) -> str | None:
    """What a folder is of, and not of this model, settings and inputs; UsageError if the manifest is none."""
    try:
        found = json.loads(manifest.read_text())
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{found['format']} {found['version']}")
        return _first_difference(identity, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{manifest} is not a manifest of features ({error}); name a new folder as --out") from None


def _first_difference(ours: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    now = {entry["source"]: entry for entry in ours["inputs"]}
    then = {entry["source"]: entry for entry in found["inputs"]}
    if list(now) != list(then):
        return f"other inputs: {_some(then)}, not {_some(now)}"
    for name, entry in now.items():
        if any(entry[key] != then[name][key] for key in ("kind", "rows", "fingerprint")):
            return f"other inputs: {name} has changed since (rows then {then[name]['rows']:,}, now {entry['rows']:,})"
    for section, word in (("model", "another model"), ("settings", "other settings")):
        for key in sorted(ours[section].keys() | found[section].keys()):
            a, b = ours[section].get(key), found[section].get(key)
            if a != b and not (section == "model" and key == "source"):  # a model may have been moved
                return f"{word}: there {key} is {b}, here {a}"
    return None


def _some(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _line(source: str, row_id: str, reason: str) -> str:
    return json.dumps({"source": source, "id": row_id, "reason": reason}, ensure_ascii=False) + "\n"


def _table(source: str, ids: list[str], features: np.ndarray) -> pa.Table:
    kind = pa.from_numpy_dtype(features.dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), kind), features.shape[1])
    sources = pa.DictionaryArray.from_arrays(np.zeros(len(ids), dtype=np.int32), [source])
    return pa.table({"id": pa.array(ids, pa.string()), "source": sources, "feature": vectors})


def _write_parquet(folder: Path, name: str, source: str, ids: list[str], features: np.ndarray) -> list[str]:
    file = f"{name}.parquet"
    with files.atomic_file(folder / file) as temporary:
        pq.write_table(_table(source, ids, features), temporary, compression="zstd", compression_level=1)
    return [file]


def _write_arrow(folder: Path, name: str, source: str, ids: list[str], features: np.ndarray) -> list[str]:
    file = f"{name}.arrow"
    table = _table(source, ids, features)
    with files.atomic_file(folder / file) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table)
    return [file]


def _write_npy(folder: Path, name: str, source: str, ids: list[str], features: np.ndarray) -> list[str]:
    file, names = f"{name}.npy", f"{name}.ids.jsonl"
    lines = (json.dumps({"id": row_id, "source": source}, ensure_ascii=False) + "\n" for row_id in ids)
    files.write_bytes(folder / names, "".join(lines).encode())
    with files.atomic_file(folder / file) as temporary, open(temporary, "wb") as handle:
        np.save(handle, features)
    return [file, names]


_WRITERS = {"parquet": _write_parquet, "arrow": _write_arrow, "npy": _write_npy}
