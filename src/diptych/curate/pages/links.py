"""Addresses on a page: which one a picture has, and where it leads.

They are resolved as the URL standard says. Most addresses need no parser for that: a path of harmless characters
is put behind the right folder of the base (`Base`), and the parser is left to those that may hold a surprise.
"""

import re
from collections.abc import Iterator

import ada_url

URL_SCHEME = "url_scheme"
URL_INVALID = "url_invalid"
URL_TOO_LONG = "url_too_long"

_MOST_URL = 4096
_WEB = ("http://", "https://")
_CANDIDATE = re.compile(
    r"""[ \t\n\f\r,]*+                             # between two candidates
    ([^ \t\n\f\r]*[^ \t\n\f\r,])                   # the address: holds commas, does not end with one
    ((?:[^,(]++|\([^)]*+\)?+)*+)                   # its descriptors; none if a comma ends it at once""",
    re.VERBOSE,
)
_DESCRIPTOR = re.compile(r"(\d+(?:\.\d+)?)([wx])")
_LETTERS = r"A-Za-z0-9_~!$&()*+,;=@'-"
_STEP = rf"(?:[{_LETTERS}]|%(?!2[Ee]))(?:[{_LETTERS}.]++|%(?!2[Ee]))*+"  # not empty, no dot at its beginning
_PLAIN = re.compile(
    rf"""(https?://[a-z0-9-]+(?:\.[a-z0-9-]+)*+/|/|(?:\.\./)*+)       # a host, its root, or folders to go up
    ((?:{_STEP}/++)*+(?:{_STEP})?+(?:\?[A-Za-z0-9_.~!$&()*+,;=:@/?%-]*+)?+)""",
    re.VERBOSE,
)


class Base:
    """What the addresses of one page are resolved against."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._origins: dict[str, str] = {}
        self._folders = _folders_of(url)

    def resolve(self, address: str) -> tuple[str, str | None]:
        """An address on the page -> one that can be fetched, without fragment, and the reason if there is none."""
        match = _PLAIN.fullmatch(address) if self._folders and len(address) <= _MOST_URL else None
        if match is None:
            return resolve(self.url, address)
        start, rest = match.groups()
        folders = self._folders
        if not start:
            if not rest or rest[0] == "?":  # the base's own name stays
                return resolve(self.url, address)
            return folders[0] + rest, None
        if start[0] == ".":
            return folders[min(len(start) // 3, len(folders) - 1)] + rest, None
        if start[0] == "/":
            return folders[-1] + rest, None
        origin = self._origins.get(start)
        if origin is None:
            origin, reason = resolve("", start)
            if reason is not None:
                return origin, reason
            self._origins[start] = origin
        return origin + rest, None


def _folders_of(url: str) -> list[str]:
    """The folder of a page, the one above it, ... and the root of its host; none if it is no page of the web."""
    try:
        place = ada_url.normalize_url(url)
    except ValueError:
        return []
    if not place.startswith(_WEB):
        return []
    place = place.partition("#")[0].partition("?")[0]
    root = place.index("/", len("https://")) + 1
    folders = [place[: place.rindex("/") + 1]]
    while len(folders[-1]) > root:
        folders.append(folders[-1][: folders[-1].rindex("/", 0, -1) + 1])
    return folders


def resolve(base: str, address: str) -> tuple[str, str | None]:
    """`Base(base).resolve(address)` for a single address, by the parser alone."""
    if len(address) > _MOST_URL:
        return "", URL_SCHEME if address[:5].lower() == "data:" else URL_TOO_LONG
    try:
        url = ada_url.join_url(base, address) if base else ada_url.normalize_url(address)
    except ValueError:
        return "", URL_INVALID
    if not url.startswith(_WEB):
        return "", URL_SCHEME
    return url.partition("#")[0], None


def largest_candidate(srcset: str) -> str:
    """The address with the largest width or density in a `srcset`; empty if it holds none.

    >>> largest_candidate("a.jpg 1x, b,c.jpg 2x, d.jpg")
    'b,c.jpg'
    """
    best, best_size = "", -1.0
    for address, descriptors in split_srcset(srcset):
        size = 1.0
        if descriptors:
            match = next((m for m in map(_DESCRIPTOR.fullmatch, descriptors) if m), None)
            if match is None:
                continue
            size = float(match[1])
        if size > best_size and not address.startswith("data:"):
            best, best_size = address, size
    return best


def split_srcset(srcset: str) -> Iterator[tuple[str, list[str]]]:
    """Addresses and descriptors of a `srcset`, as the HTML standard cuts it: addresses may hold commas, not end so."""
    place = 0
    while match := _CANDIDATE.match(srcset, place):
        place = match.end()
        yield match[1], match[2].split()
