"""Files of a crawl -> pages as they were sent, with what the server said about them.

WARC responses are freed of transfer and content encodings, never to more than the limit. What says that it is no HTML
page, or was not answered with 200, is passed over in silence; a page that cannot be had is a `Drop` with a reason.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from diptych import files
from diptych.curate.pages.warc import TOO_LARGE, Damage, Readable, Record, read_records
from diptych.errors import NotFoundError, UsageError, install

Kind = Literal["html", "wat"]

PAGE_TOO_LARGE = "page_too_large"
PAGE_ENCODING = "page_encoding"
PAGE_TYPE = "page_type"
"""Nothing says what it is: there is no Content-Type."""
FILE_UNREADABLE = "file_unreadable"

ARCHIVES = (".warc", ".warc.gz", ".wat", ".wat.gz")
PLAIN = (".html", ".htm", ".xhtml", ".html.gz", ".htm.gz")
MAX_ENCODINGS = 4
"""Content encodings of a page, one inside the other."""
_HEAD_BYTES = 1 << 16
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s;\"',]+)", re.IGNORECASE)
_PICTURE_TAG = re.compile(rb"<\0?[iI]\0?[mM]")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


@dataclass(frozen=True, slots=True)
class Page:
    """One page."""

    kind: Kind
    url: str
    """Where it was; empty if nothing says."""
    charset: str
    """Charset in the Content-Type header, or empty."""
    robots: str
    """All X-Robots-Tag headers."""
    body: bytes
    """HTML; for a WAT record its JSON."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Something that gave no page."""

    url: str
    reason: str
    offset: int
    """In the file."""


def open_input(path: str) -> Any:
    """A file at a path or fsspec URL, as a stream of its stored bytes."""
    import fsspec  # not in the parser's process, which starts sooner without it

    files.require_file(path)
    try:
        store, place = fsspec.core.url_to_fs(path)
        return store.open(place, "rb")
    except FileNotFoundError:
        raise NotFoundError(f"{path} is not there; an input is a file or folder of WARC, WAT or HTML") from None
    except (ValueError, ImportError) as error:
        raise UsageError(f"{path} cannot be opened: {error}; {install('remote')} for http") from None


def read_pages(stream: Readable, path: str, url: str, limit: int) -> Iterator[Page | Drop]:
    """Pages of one file; `url` is that of a plain HTML file."""
    if path.endswith(PLAIN):
        yield _read_plain(stream, url, limit, packed=path.endswith(".gz"))
        return
    for record in read_records(stream, {"response", "resource", "metadata"}, limit + _HEAD_BYTES):
        if isinstance(record, Damage):
            yield Drop("", record.reason, record.offset)
            continue
        page = _read_record(record, limit)
        if page is not None:
            yield page


def may_hold_pictures(page: Page) -> bool:
    """Whether a page has a tag that can become an `img` (`image` can); true of any encoding a page may be in."""
    return page.kind == "wat" or _PICTURE_TAG.search(page.body) is not None


def _read_plain(stream: Readable, url: str, limit: int, *, packed: bool) -> Page | Drop:
    body: bytes | None = stream.read(limit + 1)
    if packed and body is not None:
        body = _inflate(body, 31, limit)
    if body is None:
        return Drop(url, PAGE_ENCODING, 0)
    if len(body) > limit:
        return Drop(url, PAGE_TOO_LARGE, 0)
    return Page("html", url, "", "", body)


def _read_record(record: Record, limit: int) -> Page | Drop | None:
    url = record.headers.get("warc-target-uri", "").strip("<>")
    if record.headers["warc-type"] == "metadata":
        if not record.headers.get("content-type", "").startswith("application/json"):
            return None
        if record.cut:
            return Drop(url, TOO_LARGE, record.offset)
        return Page("wat", url, "", "", record.body)
    if not url.startswith(("http://", "https://")):
        return None
    if record.headers["warc-type"] == "resource":
        return _finish(record, url, record.headers.get("content-type", ""), "", record.body, limit)
    end = _HEADER_END.search(record.body, 0, _HEAD_BYTES)
    if not end:
        return None
    lines = record.body[: end.start()].decode("latin-1").split("\n")
    if " 200" not in lines[0]:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    kind = headers.get("content-type", "")
    if kind and not kind.lower().startswith(_HTML_TYPES):
        return None
    body: bytes | None = record.body[end.end() :]
    if not record.cut:
        if headers.get("transfer-encoding", "").lower().endswith("chunked"):
            body = _join_chunks(body)
        body = _decode_all(body, headers.get("content-encoding", ""), limit)
    if body is None:
        return Drop(url, PAGE_ENCODING, record.offset)
    return _finish(record, url, kind, headers.get("x-robots-tag", ""), body, limit)


def _finish(record: Record, url: str, kind: str, robots: str, body: bytes, limit: int) -> Page | Drop | None:
    if not kind:
        return Drop(url, PAGE_TYPE, record.offset)
    if not kind.lower().startswith(_HTML_TYPES):
        return None
    if record.cut or len(body) > limit:
        return Drop(url, PAGE_TOO_LARGE, record.offset)
    charset = _CHARSET.search(kind)
    return Page("html", url, charset[1] if charset else "", robots, body)


def _join_chunks(body: bytes) -> bytes:
    """Undo the chunked transfer encoding; archives that undid it but kept the header are taken as they are."""
    parts, place = [], 0
    while match := _CHUNK_SIZE.match(body, place):
        size = int(match[1], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[match.end() : match.end() + size])
        place = match.end() + size
        place += 2 if body[place : place + 2] == b"\r\n" else 1 if body[place : place + 1] == b"\n" else 0
    return b"".join(parts) if parts else body


def _decode_all(body: bytes, encodings: str, limit: int) -> bytes | None:
    """Undo a list of content encodings, the last one first; None if that is not possible."""
    listed = [encoding for one in encodings.lower().split(",") if (encoding := one.strip())]
    listed = [encoding for encoding in listed if encoding not in ("identity", "none", "utf-8")]
    decoded: bytes | None = body if len(listed) <= MAX_ENCODINGS else None
    for encoding in reversed(listed):
        if decoded is None or len(decoded) > limit:
            break
        decoded = _decode(decoded, encoding, limit)
    return decoded


def _decode(body: bytes, encoding: str, limit: int) -> bytes | None:
    """Undo one content encoding; None if that is not possible."""
    if encoding in ("gzip", "x-gzip"):
        if body[:2] != b"\x1f\x8b":  # undone by the archive
            return body
        return _inflate(body, 31, limit)
    if encoding == "deflate":
        unpacked = _inflate(body, 15, limit)
        return unpacked if unpacked is not None else _inflate(body, -15, limit)
    if encoding in ("br", "zstd"):
        return _decompress(body, "brotli" if encoding == "br" else encoding, limit)
    return None


def _decompress(body: bytes, codec: str, limit: int) -> bytes | None:
    """At most one byte more than the limit, unpacked piece by piece."""
    import pyarrow as pa  # not in the parser's process, which starts sooner without it

    try:
        with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
            return stream.read(limit + 1)
    except OSError:
        return None


def _inflate(body: bytes, bits: int, limit: int) -> bytes | None:
    """At most one byte more than the limit; what a stream cut short gives is kept."""
    try:
        return zlib.decompressobj(bits).decompress(body, limit + 1)
    except zlib.error:
        return None
