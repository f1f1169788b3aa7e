"""Deleting samples from a dataset: by key, by the address of the picture or of the page it was found on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from diptych import files
from diptych.curate.config import DeleteConfig
from diptych.curate.write import COMPACTED
from diptych.errors import NotFoundError, UsageError
from diptych.shards.compact import CompactReport, compact
from diptych.shards.dataset import load_dataset
from diptych.shards.tombstones import DELETED, read_tombstones, write_tombstones
from diptych.stage import folder as parts
from diptych.stage.folder import MANIFEST_FILE

URLS = ("image_url", "page_url", "final_url", "url")
"""Where a sample's JSON holds addresses; `url` is img2dataset's."""


@dataclass(frozen=True, kw_only=True)
class DeleteReport:
    """What was deleted."""

    deleted: int
    """Samples that are left out from now on and were not before."""
    before: int
    """Samples that were left out already."""
    not_found: tuple[str, ...]
    """Keys and addresses that no sample has."""
    compacted: CompactReport | None
    """What was taken out for good."""


def run(config: DeleteConfig) -> DeleteReport:
    """Add to the folder's tombstones; with `compact` take out what they name."""
    wanted = set(config.key) | set(config.url)
    if config.file is not None:
        wanted |= set(_read_list(config.file))
    dataset = load_dataset(config.shards)
    with files.hold_folder(config.shards):
        before = read_tombstones(config.shards)
        found: set[str] = set()
        keys: set[str] = set()
        if wanted:
            for shard in dataset.shards:
                table = shard.table
                for key, details in zip(table["key"].to_pylist(), table["details"].to_pylist(), strict=True):
                    named = wanted.intersection((key, *_addresses(details)))
                    found |= named
                    if named:
                        keys.add(key)
        if not keys <= before:
            write_tombstones(config.shards, before | keys)
        compacted = _compact(config.shards) if config.compact else None
    return DeleteReport(
        deleted=len(keys - before),
        before=len(before),
        not_found=tuple(sorted(wanted - found)),
        compacted=compacted,
    )


def _read_list(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise NotFoundError(f"no such file: {path} (a key or an address on each line)")
    if path.stat().st_size > files.MAX_TABLE:
        raise UsageError(f"{path} has more than {files.MAX_TABLE:,} bytes; delete with several lists")
    with open(path, "rb") as file:
        for number, line in enumerate(files.iter_lines(file), 1):
            if line is None:
                raise UsageError(f"{path} is no list of keys: its line {number} has over {files.MAX_LINE:,} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from None
            if text:
                yield text


def _addresses(details: str) -> list[str]:
    values = files.parse_json(details)
    return [value for name in URLS if isinstance(value := values.get(name), str)]


def _compact(folder: Path) -> CompactReport:
    """Compact the shards and say so in the manifest, if a stage wrote them and it says something else: of this run, or
    of one that was killed in between."""
    report = compact(folder)
    if not (folder / MANIFEST_FILE).exists():
        return report
    manifest, dataset = parts.read_manifest(folder), load_dataset(folder)
    gone = manifest.kept - len(dataset)
    if not gone:
        return report
    for record in (folder / "done").glob("*.json"):
        record.unlink()  # what they vouch for is gone
    taken = int(manifest.config.get(COMPACTED, 0)) + gone
    listed = {name: digest for name, digest in manifest.files.items() if (folder / name).exists()}
    for shard in dataset.shards:
        for path in (shard.path, shard.path.with_suffix(".arrow")):
            listed.setdefault(path.name, files.sha256(path))
    config = {**manifest.config, COMPACTED: taken}
    dropped = {**manifest.dropped, DELETED: manifest.dropped.get(DELETED, 0) + gone}
    changed = replace(
        manifest,
        config=config,
        kept=len(dataset),
        dropped=dict(sorted(dropped.items())),
        files=dict(sorted(listed.items())),
    )
    parts.save_manifest(folder, changed)
    return report
