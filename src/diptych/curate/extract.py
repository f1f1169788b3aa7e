"""A page -> its pictures with texts. Runs in the parser's own process (see `parser`), so it imports little.

Every `img` that the page shows is looked at (also in `noscript`, not in `template` or comments), with its attributes
and the `figcaption` of its `figure`. Addresses are resolved as browsers do, against the first `base` that works.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ada_url
import orjson
from resiliparse.parse.encoding import detect_encoding
from selectolax.lexbor import LexborHTMLParser, LexborNode

from diptych.curate.charset import decode
from diptych.curate.pages import Page

OPT_OUT = "opt_out"
PAGE_JSON = "page_json"
PAGE_TOO_MANY = "page_too_many"
URL_SCHEME = "url_scheme"
URL_INVALID = "url_invalid"
URL_TOO_LONG = "url_too_long"
TEXT_TOO_LONG = "text_too_long"

_MOST_PICTURES = 10_000
_MOST_URL = 4096
_MOST_TEXT = 8192
_NAMES = ("robots", "diptych")
_SPACE = " \t\n\f\r"
_DESCRIPTOR = re.compile(r"(\d+(?:\.\d+)?)([wx])")
_ROBOTS_WORDS = re.compile(r"[a-z]+")
_SIZE = re.compile(r"\s*(\d{1,5})")


class Found(NamedTuple):
    """A picture with one text."""

    image_url: str
    """Empty if there is none that could be fetched; see `reason`."""
    caption: str
    origin: str
    """Where the text stood: alt, title, figcaption, ..."""
    width: str
    height: str
    """As the page says, digits or empty."""
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Extract:
    """What is looked for; called with a page it gives what was found, or the reason that nothing was."""

    texts: tuple[str, ...]
    lazy: tuple[str, ...]
    srcset: bool
    opt_outs: tuple[str, ...]

    def __call__(self, page: Page) -> list[Found] | str:
        if self._opts_out(page.robots, header=True):
            return OPT_OUT
        return self._read_wat(page) if page.kind == "wat" else self._read_html(page)

    def _read_html(self, page: Page) -> list[Found] | str:
        tree = LexborHTMLParser(decode(page.body, page.charset, detect_encoding))
        pictures: list[LexborNode] = []
        bases, captions = [], []
        for node in tree.css("img,base,meta[name],figcaption"):
            tag = node.tag
            if tag == "img":
                pictures.append(node)
            elif tag == "figcaption":
                captions.append(node)
            elif tag == "base":
                bases.append(node.attributes.get("href"))
            elif self._is_opt_out(node.attributes):
                return OPT_OUT
        if len(pictures) > _MOST_PICTURES:
            return PAGE_TOO_MANY
        figures = _captions_by_picture(captions) if "figcaption" in self.texts else {}
        base = _base_of(page.url, bases)
        found: list[Found] = []
        for node in pictures:
            attributes = node.attributes
            texts = self._texts_of(attributes, figures.get(node.mem_id, "") if figures else "")
            if texts:
                address = self._address_of(attributes) or (_picture_source(node) if self.srcset else "")
                found.extend(_pair(base, address, texts, attributes))
        return found

    def _read_wat(self, page: Page) -> list[Found] | str:
        try:
            html = orjson.loads(page.body)["Envelope"]["Payload-Metadata"]["HTTP-Response-Metadata"]["HTML-Metadata"]
            head, links = html.get("Head") or {}, html.get("Links") or []
            metas, base = head.get("Metas") or [], head.get("Base")
            pictures = [link for link in links if str(link.get("path", "")).startswith("IMG@/")]
        except KeyError:
            return []  # a record about something that is no page
        except (ValueError, TypeError, AttributeError):
            return PAGE_JSON
        if any(self._is_opt_out(meta) for meta in metas if isinstance(meta, dict)):
            return OPT_OUT
        if len(pictures) > _MOST_PICTURES:
            return PAGE_TOO_MANY
        base = _base_of(page.url, [base])
        wanted = {"src", *self.lazy}
        found: list[Found] = []
        for link in pictures:
            if link["path"].removeprefix("IMG@/") not in wanted:
                continue
            attributes = {name: value for name, value in link.items() if isinstance(value, str)}
            texts = self._texts_of(attributes, "")
            found.extend(_pair(base, attributes.get("url", "").strip(_SPACE), texts, attributes))
        return found

    def _texts_of(self, attributes: Mapping[str, str | None], figcaption: str) -> dict[str, str]:
        """Text -> where it stood; the first place counts."""
        texts: dict[str, str] = {}
        for name in self.texts:
            text = figcaption if name == "figcaption" else attributes.get(name)
            if text:
                text = " ".join(text.split())
                if text and text not in texts:
                    texts[text] = name
        return texts

    def _address_of(self, attributes: Mapping[str, str | None]) -> str:
        """The address that a browser would end up loading at the largest size; empty if there is none."""
        if self.srcset:
            for name in ("data-srcset", "srcset") if self.lazy else ("srcset",):
                value = attributes.get(name)
                if value and (best := largest_candidate(value)):
                    return best
        for name in self.lazy:
            value = (attributes.get(name) or "").strip(_SPACE)
            if value and not value.startswith(("{", "[")):  # some pages keep JSON there
                return value
        return (attributes.get("src") or "").strip(_SPACE)

    def _is_opt_out(self, meta: Mapping[str, Any]) -> bool:
        name, content = meta.get("name"), meta.get("content")
        return (
            isinstance(name, str)
            and isinstance(content, str)
            and name.strip(_SPACE).lower() in _NAMES
            and self._opts_out(content, header=False)
        )

    def _opts_out(self, value: str, *, header: bool) -> bool:
        if not value or not self.opt_outs:
            return False
        for directive in value.lower().split(","):
            agent, colon, rest = directive.partition(":")
            if header and colon and agent.strip() not in (*_NAMES, "*"):
                continue  # for another robot, or a directive with a value, such as max-image-preview
            words = set(_ROBOTS_WORDS.findall(rest if header and colon else directive))
            if "none" in words:
                words |= {"noindex", "nofollow"}
            if not words.isdisjoint(self.opt_outs):
                return True
        return False


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
    place, end = 0, len(srcset)
    while True:
        while place < end and srcset[place] in _SPACE + ",":
            place += 1
        if place >= end:
            return
        start = place
        while place < end and srcset[place] not in _SPACE:
            place += 1
        address = srcset[start:place]
        if address.endswith(","):
            yield address.rstrip(","), []
            continue
        start, depth = place, 0
        while place < end and (depth or srcset[place] != ","):
            depth += {"(": 1, ")": -1 if depth else 0}.get(srcset[place], 0)
            place += 1
        yield address, srcset[start:place].split()


def resolve(base: str, address: str) -> tuple[str, str | None]:
    """An address on a page -> one that can be fetched, without fragment, and the reason if there is none."""
    if len(address) > _MOST_URL:
        return "", URL_SCHEME if address[:5].lower() == "data:" else URL_TOO_LONG
    try:
        url = ada_url.join_url(base, address) if base else ada_url.normalize_url(address)
    except ValueError:
        return "", URL_INVALID
    if not url.startswith(("http://", "https://")):
        return "", URL_SCHEME
    return url.partition("#")[0], None


def _base_of(page_url: str, hrefs: list[Any]) -> str:
    """The base address of a page: the first `base` with an address counts, if that address can be used."""
    for href in hrefs:
        if isinstance(href, str):
            base, reason = resolve(page_url, href.strip(_SPACE))
            return base if reason is None else page_url
    return page_url


def _pair(base: str, address: str, texts: dict[str, str], attributes: Mapping[str, str | None]) -> Iterator[Found]:
    if not address:
        url, reason = "", URL_INVALID
    else:
        url, reason = resolve(base, address)
    width, height = (_size(attributes.get(name)) for name in ("width", "height"))
    for text, origin in texts.items():
        if len(text) > _MOST_TEXT:
            yield Found(url, text[:_MOST_TEXT], origin, width, height, reason or TEXT_TOO_LONG)
        else:
            yield Found(url, text, origin, width, height, reason)


def _size(value: str | None) -> str:
    match = _SIZE.match(value) if value else None
    return match[1] if match else ""


def _captions_by_picture(captions: list[LexborNode]) -> dict[int, str]:
    """Picture -> text of its closest figure's first caption."""
    texts: dict[int, str] = {}
    seen: set[int] = set()
    for caption in captions:
        figure = caption.parent
        while figure is not None and figure.tag != "figure":
            figure = figure.parent
        if figure is None or figure.mem_id in seen:
            continue
        seen.add(figure.mem_id)
        text = caption.text(separator=" ")
        for picture in figure.css("img"):
            if _closest_figure(picture) == figure.mem_id:
                texts[picture.mem_id] = text
    return texts


def _closest_figure(node: LexborNode) -> int:
    parent = node.parent
    while parent is not None and parent.tag != "figure":
        parent = parent.parent
    return parent.mem_id if parent is not None else 0


def _picture_source(node: LexborNode) -> str:
    """The largest candidate of the first usable `source` beside a picture that has no address of its own."""
    parent = node.parent
    if parent is None or parent.tag != "picture":
        return ""
    for source in parent.css("source"):
        for name in ("data-srcset", "srcset"):
            value = source.attributes.get(name)
            if value and (best := largest_candidate(value)):
                return best
    return ""
