"""What is to be embedded, as sources: lists of rows with a fixed order, of which any range can be read anywhere.

    photos/  'photos/**/*.png'  a.jpg   pictures; the id is the path relative to the folder, or where the glob begins
    shards/  00000.tar  {00..99}.tar    the pictures of shards, or with kind text their captions; the id is the key
    pairs.parquet:image                 a column of encoded pictures, paths or captions; the id is the row number
    prompts.txt                         one text a line; the id is the line number

Row and line numbers begin at 0. Several files, or a folder of them, are one source each, so a pair (source, id) is
unique. A source is a plain value that travels to other machines; what it lists is read there. A file that is named is
of a kind that is known or refused; others that a folder or a glob has too are counted as passed over.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.embed.config import InputKind
from diptych.embed.sources import (
    ParquetSource,
    PictureSource,
    ShardSource,
    Source,
    TextSource,
    are_base64,
    first_texts,
    pictures_of_type,
)
from diptych.errors import NotFoundError, UsageError
from diptych.image_file import IMAGE_SUFFIXES, find_images

_OTHER_SUFFIXES = frozenset({".tar", ".parquet", ".txt"})
_KNOWN = f"pictures ({' '.join(sorted(IMAGE_SUFFIXES))}), shards (.tar), columns (.parquet:COLUMN) and texts (.txt)"
_LOOKED_AT = 100
"""Lines of text that decide whether they are paths."""
_LONGEST_PATH = 1 << 14


def open_inputs(inputs: Sequence[str], kind: InputKind | None = None) -> list[Source]:
    """Find and list everything that the inputs name; `kind` decides what columns of text and shards stand for.

    Raises NotFoundError for what is not there and UsageError for what cannot be embedded, or is of the other kind.
    """
    if not all(inputs) or not inputs:
        raise UsageError("no input was named; give folders, globs, shards, file.parquet:column or text files")
    named = [one for given in inputs for one in ([given] if Path(given).exists() else files.expand_range(given))]
    pictures = [given for given in named if _is_picture(given)]
    others = [given for given in named if not _is_picture(given)]
    sources = [source for given in others for source in _open(given, kind)]
    if pictures:
        sources.append(_open_pictures([Path(picture) for picture in pictures]))
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            raise UsageError(f"{name} is named {count} times; its rows would not be told apart, so name it once")
    _check_kinds(sources, kind)
    if not any(source.rows for source in sources):
        raise NotFoundError(f"nothing to embed in {' '.join(inputs)} ({_why_nothing(sources, kind)})")
    return sources


def _check_kinds(sources: Sequence[Source], kind: InputKind | None) -> None:
    """Columns of text and shards become what is asked for; of the rest nothing is made that it is not."""
    for source in sources:
        if kind is not None and source.kind != kind:
            holds, wanted = ("pictures", "texts") if source.kind == "image" else ("texts", "pictures")
            raise UsageError(f"{source.name} holds {holds}; leave --kind {kind} out, or name inputs that hold {wanted}")


def _why_nothing(sources: Sequence[Source], kind: InputKind | None) -> str:
    reasons = Counter(reason for source in sources for _, reason in source.lost)
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    hint = "; without --kind text the pictures are embedded" if kind == "text" and "no_caption" in reasons else ""
    return f"{counts}{hint}" if counts else "no rows"


def _is_picture(given: str) -> bool:
    return Path(given).is_file() and Path(given).suffix.lower() in IMAGE_SUFFIXES


def _open_pictures(paths: Sequence[Path]) -> PictureSource:
    """Single pictures are one source (a shell may have spelled a glob out), of the folder that they share."""
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    names = [str(path.relative_to(folder)) for path in paths]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        raise UsageError(f"{folder / twice} is named more than once; name every picture once")
    return PictureSource.open(str(folder), folder, tuple(names))


def _open(given: str, kind: InputKind | None) -> list[Source]:
    if "://" in given:
        raise UsageError(f"{given} is a URL; features are made of files, so copy it to a disk first")
    place, column = _split(given)
    path = Path(place)
    if path.is_dir():
        return _open_folder(path, column, kind)
    files.require_file(path)
    if path.exists():
        return [_open_file(path, column, kind)]
    if not files.is_glob(place):
        raise NotFoundError(f"no such input: {given} (a folder, glob, picture, .tar, file.parquet:column or .txt)")
    return _open_glob(place, column, kind)


def _split(given: str) -> tuple[str, str | None]:
    """`file.parquet:column` in two; a path that exists is a path, whatever is in its name, and a column's name may have
    a colon too."""
    ends = [match.start() for match in re.finditer(":", given)]
    if not ends or Path(given).exists():
        return given, None
    there = [end for end in ends if Path(given[:end]).exists()]
    tables = [end for end in ends if given[:end].lower().endswith(".parquet")]
    end = [*there[-1:], *tables[:1], ends[-1]][0]
    return given[:end], given[end + 1 :]


def _open_file(path: Path, column: str | None, kind: InputKind | None) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return open_column(path, column, kind)
    if column is not None:
        raise UsageError(f"{path} has no columns; only of a .parquet one is named, like pairs.parquet:image")
    if suffix == ".tar":
        return ShardSource.open(path, kind or "image")
    if suffix == ".txt":
        if kind is None:
            _refuse_list(path)
        return TextSource.open(path)
    raise UsageError(f"{path} is of no kind that can be embedded; known are {_KNOWN}: convert or rename it")


def _refuse_list(path: Path) -> None:
    """Raise UsageError for lines that all name pictures: as texts, nobody means them."""
    with open(path, "rb") as file:
        read = itertools.islice(iter(lambda: file.readline(_LONGEST_PATH), b""), _LOOKED_AT)
        named = [text for line in read if (text := line.decode("utf-8-sig", "replace").strip())]
    if named and all("://" in line or os.path.splitext(line)[1].lower() in IMAGE_SUFFIXES for line in named):
        raise UsageError(
            f"{path} lists pictures, like {named[0][:80]}; name the pictures, their folder or a column of paths in a "
            ".parquet (URLs are not fetched), or add --kind text to embed its lines as texts"
        )


def _open_folder(folder: Path, column: str | None, kind: InputKind | None) -> list[Source]:
    """Shards if there are any, Parquet files if a column is named, else the pictures below."""
    if column is None and (tars := sorted(folder.glob("*.tar"))):
        return [ShardSource.open(tar, kind or "image") for tar in tars]
    tables = sorted(folder.glob("*.parquet"))
    if column is not None and tables:
        return [open_column(table, column, kind) for table in tables]
    if column is not None:
        raise NotFoundError(f"no .parquet files in {folder}, of which the column {column!r} was named")
    names, passed_over = find_images(folder)
    if not names and tables:
        raise UsageError(_name_a_column(tables[0]))
    if not names:
        others = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(passed_over.items()))
        raise NotFoundError(f"no pictures, .tar or .parquet in {folder} (other files: {others or 'none'})")
    return [PictureSource.open(str(folder), folder, names, passed_over)]


def _open_glob(pattern: str, column: str | None, kind: InputKind | None) -> list[Source]:
    """Shards, Parquet and text files are a source each, the pictures one; other files are passed over."""
    found = [Path(path) for path in files.expand_glob(pattern)]
    if not found:
        raise NotFoundError(f"nothing matches {pattern}")
    special = [path for path in found if path.suffix.lower() in _OTHER_SUFFIXES]
    sources = [_open_file(path, column, kind) for path in special]
    pictures = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    known = IMAGE_SUFFIXES | _OTHER_SUFFIXES
    others = Counter(path.suffix.lower() for path in found if path.suffix.lower() not in known)
    if len(special) < len(found) and column is not None:
        first = next(path for path in found if path not in special)
        raise UsageError(f"{pattern} matches {first}, which has no column {column!r}; match .parquet files only")
    if not pictures and not special:
        raise UsageError(f"{pattern} matches {found[0]}, and no file that can be embedded; known are {_KNOWN}")
    if pictures:
        fixed = itertools.takewhile(lambda part: not files.is_glob(part), Path(pattern).parts[:-1])
        root = Path(*fixed)
        names = tuple(str(path.relative_to(root)) for path in pictures)
        sources.append(PictureSource.open(pattern, root, names))
    sources[-1] = replace(sources[-1], passed_over=dict(sorted(others.items())))
    return sources


def open_column(path: Path, column: str | None, kind: InputKind | None) -> ParquetSource:
    """A column of a Parquet file; UsageError for one that is not named, not there, or of another kind."""
    if column is None:
        raise UsageError(_name_a_column(path))
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if (count := schema.names.count(column)) != 1:
                said = f"{count} columns" if count else "no column"
                raise UsageError(f"{path} has {said} {column!r}; it has {', '.join(schema.names)}")
            holds = _what_it_holds(path, column, file, kind)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet ({error}); write it again") from None
    return ParquetSource.open(path, column, holds, rows)


def _what_it_holds(path: Path, column: str, file: pq.ParquetFile, kind: InputKind | None) -> str:
    dtype = file.schema_arrow.field(column).type
    holds = pictures_of_type(dtype)
    if holds is None:
        raise UsageError(f"column {column!r} of {path} is {dtype}; name one of bytes (pictures) or of strings")
    if holds == "paths":
        values = first_texts(file, column)
        ends = bool(values) and all(os.path.splitext(value)[1].lower() in IMAGE_SUFFIXES for value in values)
        if kind != "text" and are_base64(values):
            return "base64"
        return "paths" if kind == "image" or (kind is None and ends) else "texts"
    if kind == "text":
        raise UsageError(f"column {column!r} of {path} holds pictures; leave --kind text out, or name one of strings")
    return holds


def _name_a_column(path: Path) -> str:
    names = ", ".join(pq.read_schema(path).names)
    return f"{path} has columns; name the one to embed, like {path}:COLUMN. It has {names}"
