"""Documents of a corpus, streamed: wiki dumps, lines of text or JSON, captions in Parquet; packed or not; by fsspec."""

import contextlib
import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diptych import files
from diptych.curate.queries.wikitext import NAMESPACES, strip_markup
from diptych.errors import NotFoundError, UsageError

_PACKED = (".bz2", ".gz", ".xz", ".zst")
_KINDS = (".xml", ".parquet", ".jsonl", ".json", ".txt")
_TEXT_COLUMNS = ("caption", "text")


def find_inputs(places: Sequence[str]) -> list[str]:
    """Paths or URLs, those with * spelled out, in order; raises NotFoundError if there is none."""
    found: list[str] = []
    for place in places:
        if any(sign in place for sign in "*?["):
            system, path = fsspec.core.url_to_fs(place)
            names = sorted(str(name) for name in system.glob(path))
            if not names:
                raise NotFoundError(f"no file matches {place}")
            found += [system.unstrip_protocol(name) if "://" in place else name for name in names]
        else:
            found.append(place)
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def open_input(place: str, *, unpack: bool = True) -> Iterator[Any]:
    """Open a file of bytes from wherever it lies; what is wrong with it is said in one line."""
    files.require_file(place)
    try:
        with fsspec.open(place, "rb", compression="infer" if unpack else None) as file:
            yield file
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {place}") from None
    except IsADirectoryError:
        raise UsageError(f"{place} is a folder; name its files, as in {place.rstrip('/')}/*") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ElementTree.ParseError, pa.ArrowException) as error:
        raise UsageError(f"{place} cannot be read to its end ({error}); fetch or write it again") from error


def file_size(place: str) -> int:
    """Bytes of a file as it lies there."""
    system, path = fsspec.core.url_to_fs(place)
    try:
        return int(system.size(path) or 0)
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {place}") from None


def kind_of(place: str) -> str:
    """The suffix of a file, without that of a packer; UsageError unless such files can be read as texts."""
    name = place.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
    if kind is None:
        raise UsageError(
            f"{place} is of no kind that is read as texts; known are {' '.join(_KINDS)}, also packed "
            f"({' '.join(_PACKED)}): convert or rename it"
        )
    return kind


def read_documents(place: str) -> Iterator[str]:
    """Plain texts of one file, one after the other; its name says how it is written."""
    kind = kind_of(place)
    with open_input(place) as file:
        if kind == ".xml":
            yield from _read_dump(file)
        elif kind == ".parquet":
            yield from _read_parquet(file, place)
        elif kind == ".txt":
            for line in filter(None, files.iter_lines(file)):
                yield line.decode("utf-8", "replace")
        else:
            yield from _read_json(file, place)


def _read_dump(file: Any) -> Iterator[str]:
    """Articles of a MediaWiki export, without redirects and pages of other namespaces."""
    namespaces = set(NAMESPACES)
    events = ElementTree.iterparse(file, events=("start", "end"))
    _, root = next(events)
    for event, element in events:
        if event == "start":
            continue
        tag = element.tag.rpartition("}")[2]
        if tag == "namespace" and element.text:
            namespaces.add(element.text.lower())
        elif tag == "page":
            page = {part.tag.rpartition("}")[2]: part for part in element.iter()}
            text = page["text"].text if "text" in page else None
            if text and "redirect" not in page and ("ns" not in page or page["ns"].text == "0"):
                yield strip_markup(text, namespaces)
            root.clear()


def _read_json(file: Any, place: str) -> Iterator[str]:
    """Texts of JSON lines, as wikiextractor and CirrusSearch write them; a line may lack one, but not all."""
    found = False
    for line in filter(bytes.strip, file):
        try:
            record = files.parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UsageError(f"{place} has a line that is no JSON object: {line[:60].decode('utf-8', 'replace')}")
        text = next((record[name] for name in _TEXT_COLUMNS if isinstance(record.get(name), str)), None)
        if text is not None:
            found = True
            yield text
    if not found:
        raise UsageError(f"{place} has no line with {' or '.join(_TEXT_COLUMNS)}")


def _read_parquet(file: Any, place: str) -> Iterator[str]:
    table = pq.ParquetFile(file)
    column = next((name for name in _TEXT_COLUMNS if name in table.schema_arrow.names), None)
    if column is None:
        raise UsageError(f"{place} has no column {' or '.join(_TEXT_COLUMNS)}, only {table.schema_arrow.names}")
    for batch in table.iter_batches(4096, columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text)
