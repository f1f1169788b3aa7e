"""The characters of a page: what the Encoding and HTML standards say about which bytes mean what.

A byte order mark wins, then the Content-Type header, then a `meta` tag in the first 1024 bytes. A page that says
nothing is UTF-8 if its bytes are valid UTF-8; otherwise it is guessed, else windows-1252. The labels and codecs of the
Encoding standard are those of webencodings. One departure: a page that says latin-1, but is UTF-8 to the last byte, is
UTF-8. A server's default says latin-1 of all pages, and text in latin-1 is hardly ever valid UTF-8.
"""

import re
from collections.abc import Callable

import webencodings

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be"))
_PRESCAN = 1024
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_META = re.compile(rb"<meta[\s/]([^>]*)", re.IGNORECASE)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
_CONTENT = re.compile(rb"http-equiv\s*=\s*[\"']?\s*content-type", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"(?:^|[\s/\"'])charset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)


def decode(body: bytes, header: str, guess: Callable[[bytes], str | None] | None = None) -> bytes | str:
    """The page as text, or as bytes if these are UTF-8 (valid or not): the parser reads those itself."""
    mark, name = next(((mark, name) for mark, name in _BOMS if body.startswith(mark)), (b"", None))
    body = body[len(mark) :]
    name = name or _name(header) or _meta_name(body[:_PRESCAN])
    if name is None:
        if body.isascii() or _is_utf8(body):
            return body
        name = _name((guess and guess(body)) or "")
        if name in (None, "utf-8", "replacement"):  # it is no UTF-8, and a guess must not empty a page
            name = "windows-1252"
    if name == "utf-8" or (name == "windows-1252" and _is_utf8(body, whole=True)):
        return body
    encoding = webencodings.lookup("gb18030" if name == "gbk" else name)  # as the standard says
    assert encoding is not None
    return encoding.codec_info.decode(body, "replace")[0]


def _name(label: str) -> str | None:
    """The standard's name for what a label stands for; None for a label that it does not know."""
    encoding = webencodings.lookup(label)
    return encoding.name if encoding else None


def _is_utf8(body: bytes, *, whole: bool = False) -> bool:
    """Whether the bytes are UTF-8, or, unless they must be `whole`, would be but for a cut in their last character."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return not whole and error.reason == "unexpected end of data"
    return True


def _meta_name(start: bytes) -> str | None:
    if b"charset" not in start.lower():
        return None
    for tag in _META.finditer(_COMMENT.sub(b"", start)):
        attributes = tag[1]
        found = _CHARSET.search(attributes) if _CONTENT.search(attributes) else _ATTRIBUTE.search(attributes)
        name = _name(found[1].decode("latin-1")) if found else None
        if name:  # the tag was read as ASCII, so the page is no UTF-16
            return {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}.get(name, name)
    return None
