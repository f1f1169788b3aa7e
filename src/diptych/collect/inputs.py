"""What people's pairs are, told by content: a name that was given -> sources.

pairs.csv  pairs.jsonl  pairs.parquet  tables of pictures (paths or bytes) and captions
captions.json                          {file: caption}, a list of objects, or COCO's annotations
data-00000-of-00001.arrow              Hugging Face datasets on disk
00000.tar  a.tar.gz  {00..99}.tar.zst  samples by WebDataset's rule
folder/                                one of the above inside it, or pictures with a .txt beside each
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from diptych import files
from diptych.collect.config import ReadConfig
from diptych.collect.sources import (
    CAPTION_NAMES,
    AnySource,
    ArrowPairs,
    Columns,
    ListedSource,
    ParquetPairs,
    TableSource,
    TarPairs,
    choose_columns,
    open_arrow,
)
from diptych.collect.tables import open_table
from diptych.embed.sources import read_values, stamp
from diptych.errors import NotFoundError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, find_images
from diptych.shards.index import split_name
from diptych.shards.members import Member, iter_members

_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_LISTS = tuple(f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in (*_TABLE_SUFFIXES, ".txt"))
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
_LOOKED_AT = 20
"""Rows that tell what the columns of a table are."""
_KNOWN = "a folder, CSV, JSON (lines, COCO's), Parquet, Arrow, or a tar (.tar, .tar.gz, .tar.zst)"


def open_sources(
    given: Sequence[str], read: ReadConfig, step: int, *, stamps: bool = False, links: bool = False
) -> list[AnySource]:
    """Find and list what the names stand for, in pieces of about `step` samples.

    With `stamps` a changed picture changes the fingerprint; with `links` tables have addresses of pictures.
    Raises NotFoundError for what is not there and UsageError for what holds no pairs, or more than one choice of them.
    """
    opener = _Opener(read, step, stamps, links)
    found = [source for name in given for source in opener.open_named(name)]
    if not found:
        raise UsageError(f"no source was named; give {_KNOWN}")
    for name, group in itertools.groupby(sorted(source.name for source in found)):
        if len(list(group)) > 1:
            raise UsageError(f"{name} is named more than once; name it once")
    return found


class _Opener:
    def __init__(self, read: ReadConfig, step: int, stamps: bool, links: bool) -> None:
        self.read, self.step, self.stamps, self.links = read, step, stamps, links

    def open_named(self, given: str) -> Iterator[AnySource]:
        if "://" in given:
            raise UsageError(
                f"{given} is a URL; copy it to a disk first (`train --data` reads tars at URLs as they are)"
            )
        names = files.spell_out(given)
        if not names:
            raise NotFoundError(f"nothing matches {given}")
        for name in names:
            path = Path(name)
            if not path.exists():
                raise NotFoundError(f"no such source: {name} ({_KNOWN})")
            yield from self._open_folder(path) if path.is_dir() else [self._open_file(path)]

    def _open_file(self, path: Path) -> AnySource:
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(b"PAR1"):
            return self._open_parquet(path)
        if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            return self._open_arrow(path)
        if head.startswith(b"\x1f\x8b"):
            return self._open_tar(path, "gzip")
        if head.startswith(b"\x28\xb5\x2f\xfd"):
            return self._open_tar(path, "zstd")
        if head[257:262] == b"ustar" or path.suffix == ".tar":
            return self._open_tar(path, None)
        if not head.strip():
            raise UsageError(f"{path} is empty")
        if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            return self._open_json(path)
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise UsageError(f"{path} is a web page, which a download gave in place of the file")
        return self._open_text_table(path)

    # --- tables ---

    def _open_text_table(self, path: Path) -> AnySource:
        table = open_table(path)
        records = (record.values for record in table.read())
        first = list(itertools.islice((values for values in records if values is not None), _LOOKED_AT))
        columns = self._choose(str(path), table.columns, first)
        return TableSource.open(table, columns, self._root(path, columns, first), self.step, stamps=self.stamps)

    def _open_parquet(self, path: Path) -> AnySource:
        try:
            with pq.ParquetFile(path) as file:
                meta = file.metadata
                groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                first = _first_rows(file.iter_batches(_LOOKED_AT))
                names = file.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{path} is no whole Parquet file ({_first_line(error)}); copy it again") from None
        columns = self._choose(str(path), names, first)
        ends = tuple(itertools.accumulate(groups, initial=0))
        fingerprint = self._fingerprint(path, columns)
        root = self._root(path, columns, first)
        return ParquetPairs(
            path=path,
            columns=columns,
            folder=root,
            groups=ends,
            step=self.step,
            fingerprint=fingerprint,
            cut=self.links,
        )

    def _open_arrow(self, path: Path) -> AnySource:
        try:
            with open_arrow(path) as (schema, batches):
                first, names = _first_rows(batches), schema.names
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{path} is no whole Arrow file ({_first_line(error)}); copy it again") from None
        columns = self._choose(str(path), names, first)
        root = self._root(path, columns, first)
        return ArrowPairs(path=path, columns=columns, folder=root, fingerprint=self._fingerprint(path, columns))

    def _choose(self, name: str, columns: Sequence[str], first: Sequence[Mapping[str, Any]]) -> Columns:
        image, captions = self.read.image_column, self.read.caption_column
        return choose_columns(name, columns, first, image, captions, links=self.links)

    def _root(self, table: Path, columns: Columns, first: Sequence[Mapping[str, Any]]) -> Path:
        """What paths are relative to: what was named, or the table's folder, or where none is there, this one."""
        if self.read.images is not None:
            return _require_folder(self.read.images)
        paths = [path for record in first if isinstance(path := record.get(columns.image), str)]
        here = any(_is_file(table.parent / path) for path in paths)
        return Path() if not here and any(map(_is_file, map(Path, paths))) else table.parent

    def _fingerprint(self, path: Path, *settings: object) -> str:
        told = f"{stamp(path)} {' '.join(map(str, settings))} {self.read.images}"
        return xxhash.xxh3_128_hexdigest(told.encode("utf-8", "surrogatepass"))

    # --- JSON ---

    def _open_json(self, path: Path) -> AnySource:
        with open(path, "rb") as file:
            first = file.readline(1 << 20)
            more = file.read(1)
        try:
            if (more or path.suffix.lower() == ".jsonl") and isinstance(json.loads(first), dict):
                return self._open_text_table(path)
        except (ValueError, RecursionError):
            pass  # an object of several lines
        try:
            content = files.parse_json(path.read_bytes())
        except ValueError as error:
            raise UsageError(f"{path} is not JSON ({error}); write it again") from None
        if isinstance(content, dict) and isinstance(content.get("annotations"), list):
            return self._open_coco(path, content)
        if isinstance(content, dict):
            records = [
                {"file": name, **(value if isinstance(value, dict) else {"caption": value})}
                for name, value in content.items()
            ]
        elif isinstance(content, list):
            records = [record for record in content if isinstance(record, dict)]
        else:
            records = []
        if not records:
            raise UsageError(f"{path} has no captions: it is neither {{file: caption}} nor a list of objects")
        columns = self._choose(str(path), list(dict.fromkeys(itertools.chain(*records))), records[:_LOOKED_AT])
        root = self._root(path, columns, records[:_LOOKED_AT])
        listed = [
            (
                str(record.get(columns.image) or ""),
                tuple(record.get(name) for name in columns.captions),
                {name: value for name, value in record.items() if name not in columns.captions},
            )
            for record in records
        ]
        return ListedSource.open(str(path), f"JSON; {columns}", root, listed, self.step)

    def _open_coco(self, path: Path, content: Mapping[str, Any]) -> AnySource:
        """COCO's annotations: all captions of a picture are its own."""
        captions: dict[Any, list[Any]] = {}
        try:
            for one in content["annotations"]:
                captions.setdefault(one["image_id"], []).append(one.get("caption"))
            pictures = {one["id"]: one for one in content["images"]}
            listed = [
                (str(one["file_name"]), tuple(captions.get(number, ())), {"image_id": number, **one, "id": None})
                for number, one in pictures.items()
            ]
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path} has annotations, but not as COCO writes them ({error!r})") from None
        if not any(isinstance(one, str) for several in captions.values() for one in several):
            raise UsageError(f"{path} has annotations without captions; COCO's are in captions_train2017.json")
        root = self._find_pictures(path, [name for name, _, _ in listed[:_LOOKED_AT]])
        return ListedSource.open(str(path), f"COCO's annotations; pictures below {root}", root, listed, self.step)

    def _find_pictures(self, path: Path, names: Sequence[str]) -> Path:
        if self.read.images is not None:
            return _require_folder(self.read.images)
        beside = path.stem.rpartition("_")[2]
        folders = [path.parent, path.parent / "images", path.parent / beside, path.parent.parent / beside,
                   path.parent.parent / "images", path.parent.parent / "images" / beside]  # fmt: skip
        for folder in folders:
            if any(_is_file(folder / name) for name in names):
                return folder
        raise UsageError(f"the pictures of {path} ({names[0]}, ...) are not beside it; name their folder by --images")

    # --- tars ---

    def _open_tar(self, path: Path, compression: str | None) -> AnySource:
        key = self.read.caption_key
        if key is None and compression is None:
            key = _find_caption_key(path)
        fingerprint = self._fingerprint(path, key, self.read.lines)
        return TarPairs(
            path=path, compression=compression, caption_key=key, lines=self.read.lines, fingerprint=fingerprint
        )

    # --- folders ---

    def _open_folder(self, folder: Path) -> list[AnySource]:
        """The first of what is there: tars, Hugging Face's files, a list of captions, pictures with a .txt, a table."""
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        if tars := [name for name in names if name.endswith(_TARS)]:
            return [self._open_file(folder / name) for name in tars]
        for splits in (self._find_saved(folder, names, folders), _find_parquet(folder), _find_lists(folder, folders)):
            if splits:
                return [self._open_file(path) for path in self._choose_split(folder, splits)]
        pictures, others = find_images(folder)
        if others[".txt"] and any((folder / name).with_suffix(".txt").is_file() for name in pictures):
            kind = "folder of pictures with a .txt beside each"
            listed = ((name, None, {"file": name}) for name in pictures)
            return [ListedSource.open(str(folder), kind, folder, listed, self.step, self.read.lines)]
        if tables := [name for name in names if name.lower().endswith(_TABLE_SUFFIXES)]:
            return [self._open_file(folder / _only(folder, tables))]
        seen = f"{len(pictures):,} pictures, " if pictures else ""
        counts = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in others.most_common(5))
        raise UsageError(
            f"no pairs in {folder} ({seen}other files: {counts or 'none'}); a caption is x.txt beside x.jpg, or a "
            "line of captions.jsonl, metadata.csv or another table there"
        )

    def _find_saved(self, folder: Path, names: Sequence[str], folders: Sequence[str]) -> dict[str, list[Path]]:
        """Files of each split of a dataset that Hugging Face's `save_to_disk` left."""
        if "state.json" in names:
            return {"": _state_files(folder)}
        return {name: _state_files(folder / name) for name in folders if (folder / name / "state.json").is_file()}

    def _choose_split(self, folder: Path, splits: Mapping[str, list[Path]]) -> list[Path]:
        wanted = self.read.split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
        if wanted is None or wanted not in splits:
            raise UsageError(f"{folder} has the splits {', '.join(sorted(splits))}; name one by --split")
        return splits[wanted]


def _find_parquet(folder: Path) -> dict[str, list[Path]]:
    """Parquet files of each split, as hubs lay them out; those of no split are `all`."""
    splits: dict[str, list[Path]] = {}
    for path in sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"))):
        split = re.split(r"[-_.]", path.stem)[0]
        if split not in _SPLITS and "-of-" not in path.stem:
            split = path.parent.name if path.parent != folder and path.parent.name in _SPLITS else "all"
        if path.name not in _LISTS and not path.name.startswith("."):
            splits.setdefault(split, []).append(path)
    return splits


def _find_lists(folder: Path, folders: Sequence[str]) -> dict[str, list[Path]]:
    """Lists of captions in a folder, or in those below."""
    splits: dict[str, list[Path]] = {}
    for place in (folder, *(folder / name for name in folders)):
        if found := [name for name in _LISTS if (place / name).is_file()]:
            split = place.name if place != folder and place.name in _SPLITS else "all"
            splits.setdefault(split, []).append(place / _only(place, found))
        if place == folder and splits:
            break
    return splits


def _state_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset that was saved to disk, in its order."""
    try:
        names = [str(one["filename"]) for one in files.read_json(folder / "state.json")["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'state.json'} is damaged ({error!r}); save the dataset again") from None
    if bad := next((name for name in names if "/" in name or not (folder / name).is_file()), None):
        raise UsageError(f"{folder} lacks {bad}, which its state.json names; copy it again")
    return [folder / name for name in names]


def _only(folder: Path, names: list[str]) -> str:
    if len(names) > 1:
        raise UsageError(f"{folder} has {', '.join(names)}; name the one that holds the pairs")
    return names[0]


def _first_rows(batches: Iterable[pa.RecordBatch]) -> list[dict[str, Any]]:
    for batch in batches:
        if batch.num_rows:
            part = batch.slice(0, _LOOKED_AT)
            values = [list(read_values(column)) for column in part.columns]
            return [dict(zip(part.schema.names, row, strict=True)) for row in zip(*values, strict=True)]
    return []


def _find_caption_key(path: Path) -> str | None:
    """Where the first sample of a tar has its captions, if it has no .txt and no `caption`."""
    stem = ""
    for member in itertools.islice(iter_members(path), _LOOKED_AT):
        if not isinstance(member, Member):
            continue
        here, suffix = split_name(member.name)
        if suffix == "txt" or (stem and here != stem):
            return None
        if f".{suffix}" in IMAGE_SUFFIXES or suffix == "json":
            stem = here
        if suffix != "json" or member.size > 1 << 20:
            continue
        with open(path, "rb") as tar:
            tar.seek(member.offset)
            try:
                details = files.parse_json(tar.read(member.size))
            except ValueError:
                return None
        if not isinstance(details, dict) or {"caption", "captions"} & details.keys():
            return None
        found = [
            name for name, value in details.items() if name.lower() in CAPTION_NAMES and isinstance(value, str | list)
        ]
        if len(found) > 1:
            raise UsageError(
                f"{path}: {', '.join(found)} may be the caption in the samples' JSON; say which by --caption-key"
            )
        return found[0] if found else None
    return None


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise NotFoundError(f"no such folder: {folder} (--images)")
    return folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:100]
