"""Queries that others have listed: titles of articles that are read, synsets of WordNet, lists that were published."""

import contextlib
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import fsspec

from diptych import files
from diptych.curate.queries.corpus import open_input
from diptych.curate.queries.ngrams import Runs
from diptych.errors import NotFoundError, UsageError

_IN_BRACKETS = re.compile(r"[ _]+\([^()]*\)$")  # Mercury (planet)
_OTHER_NAMESPACE = re.compile(r":\S")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # of where an adjective may stand: galore(ip)
_WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


def count_views(
    places: Sequence[str], scratch: Path, *, project: str, least_a_file: int, memory: int
) -> Iterator[tuple[str, int]]:
    """Titles of articles in order, with their views in all files.

    A line of an hourly file is `en Title views bytes`, where the mobile site `en.m` counts as well; of a daily one
    `en.wikipedia Title page device views hours`. Titles of other namespaces hold a colon without a space behind it and
    are left out. UsageError for a file without any line about the project.
    """
    total = Runs(scratch / "all", memory)
    for number, place in enumerate(places):
        if least_a_file == 1:
            seen = total
        else:
            seen = Runs(scratch / f"file-{number:06d}", memory)
        found = False
        with open_input(place) as file:
            for line in filter(None, files.iter_lines(file)):
                title, views = _read_views(line, project)
                if title:
                    found = True
                    seen.add(title, views)
        if not found:
            raise UsageError(
                f"{place} holds no views of articles of the project {project}; a line is `{project} Title 12 0`"
            )
        if seen is not total:
            for title, views in seen.items():
                if views >= least_a_file:
                    total.add(title, views)
    return total.items()


def _read_views(line: bytes, project: str) -> tuple[str, int]:
    """Title and views of a line; no title if it is not an article of the project."""
    fields = line.decode("utf-8", "replace").split(" ")
    if len(fields) == 4 and fields[0] in (project, f"{project}.m"):
        views = fields[2]
    elif len(fields) >= 5 and fields[0] == f"{project}.wikipedia":
        views = fields[-2]
    else:
        return "", 0
    title = unquote(fields[1]).replace("_", " ").strip()
    if not views.isdecimal() or title == "-" or _OTHER_NAMESPACE.search(title):
        return "", 0
    return title, int(views)


def clean_title(title: str) -> str:
    """A title as a text would have it: without what tells articles of one name apart."""
    return _IN_BRACKETS.sub("", title) or title


def read_wordnet(place: str) -> Iterator[str]:
    """The first word of every synset."""
    found = False
    for name, lines in _open_wordnet(place):
        if PurePosixPath(name).name not in _WORDNET_FILES:
            continue
        found = True
        for line in filter(None, files.iter_lines(lines)):
            fields = line.decode("utf-8", "replace").split(" ")
            if len(fields) > 5 and fields[0].isdigit():  # lines of the licence begin with a space
                yield _MARKER.sub("", fields[4]).replace("_", " ")
    if not found:
        raise NotFoundError(f"{place} holds none of WordNet's files {', '.join(_WORDNET_FILES)}")


def _open_wordnet(place: str) -> Iterator[tuple[str, Any]]:
    name = place.lower()
    if name.endswith(".zip"):
        with open_input(place, unpack=False) as file, _damaged(place), zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                if PurePosixPath(member).name in _WORDNET_FILES:
                    with archive.open(member) as lines:
                        yield member, lines
    elif name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        with open_input(place, unpack=False) as file, _damaged(place), tarfile.open(fileobj=file) as archive:
            for member in archive:
                lines = archive.extractfile(member) if member.isfile() else None
                if lines is not None:
                    yield member.name, lines
    else:
        system, path = fsspec.core.url_to_fs(place)
        for member in sorted(str(one) for one in system.find(path)):
            if PurePosixPath(member).name in _WORDNET_FILES:
                with system.open(member, "rb") as lines:
                    yield member, lines


@contextlib.contextmanager
def _damaged(place: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise UsageError(f"{place} is a damaged archive ({error}); fetch it again") from error


def read_list(place: str) -> Iterator[str]:
    """A query a line; of a .tsv the first column; of a .json the strings of its list."""
    with open_input(place) as file:
        name = place.lower().removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
        if name.endswith((".csv", ".parquet", ".xlsx")):
            raise UsageError(
                f"{place} is a table; a list of queries has one on each line (.txt), or a first column (.tsv)"
            )
        if name.endswith(".json"):
            try:
                content = files.parse_json(file.read(files.MAX_TABLE))
            except ValueError as error:
                raise UsageError(f"{place} is no JSON ({error}); a query list is a list of strings") from None
            if not isinstance(content, list) or not all(isinstance(query, str) for query in content):
                raise UsageError(f"{place} is not a JSON list of strings; a query list is")
            yield from content
            return
        for number, line in enumerate(files.iter_lines(file)):
            if line is None:
                raise UsageError(f"{place} has a line of more than {files.MAX_LINE:,} bytes, which is no query")
            if number == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UsageError(f"{place} is UTF-16; save it as UTF-8")
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise UsageError(f"line {number + 1} of {place} is not UTF-8; save it as UTF-8") from None
            if name.endswith(".jsonl"):
                yield _read_string(text, place)
            else:
                yield (text.partition("\t")[0] if name.endswith(".tsv") else text).strip()


def _read_string(text: str, place: str) -> str:
    try:
        query = files.parse_json(text or '""')
    except ValueError:
        query = None
    if not isinstance(query, str):
        raise UsageError(f"{place} has a line that is no JSON string: {text[:60]}")
    return query.strip()
