"""A page -> its pictures with texts. Runs in a process of its own (see `sandbox`), so it imports little.

Every `img` that the page shows is looked at (also in `noscript`, not in `template` or comments), with its attributes
and the `figcaption` of its `figure`. Addresses are resolved as browsers do, against the first `base` that works.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from resiliparse.parse.encoding import detect_encoding
from selectolax.lexbor import LexborHTMLParser, LexborNode

from diptych.curate.pages.charset import decode
from diptych.curate.pages.links import URL_INVALID, Base, largest_candidate, resolve
from diptych.curate.pages.page import Page

OPT_OUT = "opt_out"
PAGE_JSON = "page_json"
PAGE_TOO_MANY = "page_too_many"
TEXT_TOO_LONG = "text_too_long"

_MOST_PICTURES = 10_000
_MOST_TEXT = 8192
_BLOCKS = (
    "address,article,aside,blockquote,br,caption,dd,details,div,dl,dt,fieldset,figcaption,figure,footer,form,h1,h2,h3,h4,h5,"
    "h6,header,hr,li,main,nav,ol,option,p,pre,section,summary,table,tbody,td,tfoot,th,thead,tr,ul"
)
"""Elements that the standard's style sheet shows as blocks or cells: a word ends where they begin and end."""
_NAMES = ("robots", "diptych")
_SPACE = " \t\n\f\r"
_ROBOTS_WORDS = re.compile(r"[a-z]+")
_SIZE = re.compile(r"\s*(\d{1,5})")


class Found(NamedTuple):
    """What was found on a page, in columns: what stands at one place of each is one picture with one text."""

    image_urls: list[str]
    """Empty where there is none that could be fetched; see `reasons`."""
    captions: list[str]
    origins: list[str]
    """Where the text stood: alt, title, figcaption, ..."""
    widths: list[str | None]
    """As the page says, in digits."""
    heights: list[str | None]
    reasons: list[str | None]

    def add(self, base: Base, address: str, texts: Mapping[str, str], attributes: Mapping[str, str | None]) -> None:
        """A picture with its texts, each with where it stood."""
        url, reason = base.resolve(address) if address else ("", URL_INVALID)
        width, height = attributes.get("width"), attributes.get("height")
        width, height = width and _size(width), height and _size(height)
        for text, origin in texts.items():
            long = len(text) > _MOST_TEXT
            self.image_urls.append(url)
            self.captions.append(text[:_MOST_TEXT] if long else text)
            self.origins.append(origin)
            self.widths.append(width)
            self.heights.append(height)
            self.reasons.append(reason or (TEXT_TOO_LONG if long else None))


@dataclass(frozen=True, kw_only=True)
class Extract:
    """What is looked for; called with a page it gives what was found, or the reason that nothing was."""

    texts: tuple[str, ...]
    lazy: tuple[str, ...]
    srcset: bool
    opt_outs: tuple[str, ...]

    def __call__(self, page: Page) -> Found | str:
        if self._opts_out(page.robots, header=True):
            return OPT_OUT
        return self._read_wat(page) if page.kind == "wat" else self._read_html(page)

    def _read_html(self, page: Page) -> Found | str:
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
        found = Found([], [], [], [], [], [])
        for node in pictures:
            attributes = node.attributes
            texts = self._texts_of(attributes, figures.get(node.mem_id, "") if figures else "")
            if texts:
                address = self._address_of(attributes) or (_picture_source(node) if self.srcset else "")
                found.add(base, address, texts, attributes)
        return found

    def _read_wat(self, page: Page) -> Found | str:
        try:
            html = orjson.loads(page.body)["Envelope"]["Payload-Metadata"]["HTTP-Response-Metadata"]["HTML-Metadata"]
            head, links = html.get("Head") or {}, html.get("Links") or []
            metas, base = head.get("Metas") or [], head.get("Base")
            pictures = [link for link in links if str(link.get("path", "")).startswith("IMG@/")]
        except KeyError:
            return Found([], [], [], [], [], [])  # a record about something that is no page
        except (ValueError, TypeError, AttributeError):
            return PAGE_JSON
        if any(self._is_opt_out(meta) for meta in metas if isinstance(meta, dict)):
            return OPT_OUT
        if len(pictures) > _MOST_PICTURES:
            return PAGE_TOO_MANY
        base = _base_of(page.url, [base])
        wanted = {"src", *self.lazy}
        found = Found([], [], [], [], [], [])
        for link in pictures:
            if link["path"].removeprefix("IMG@/") not in wanted:
                continue
            attributes = {name: value for name, value in link.items() if isinstance(value, str)}
            texts = self._texts_of(attributes, "")
            found.add(base, attributes.get("url", "").strip(_SPACE), texts, attributes)
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
            value = attributes.get(name)
            if value and (value := value.strip(_SPACE)) and value[0] not in "{[":  # some pages keep JSON there
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
        for directive in re.split("[,;]", value.lower()):
            agent, colon, rest = directive.partition(":")
            if header and colon and agent.strip() not in (*_NAMES, "*"):
                continue  # for another robot, or a directive with a value, such as max-image-preview
            words = set(_ROBOTS_WORDS.findall(rest if header and colon else directive))
            if "none" in words:
                words |= {"noindex", "nofollow"}
            if not words.isdisjoint(self.opt_outs):
                return True
        return False


def _base_of(page_url: str, hrefs: list[Any]) -> Base:
    """The base address of a page: the first `base` with an address counts, if that address can be used."""
    for href in hrefs:
        if isinstance(href, str):
            base, reason = resolve(page_url, href.strip(_SPACE))
            return Base(base if reason is None else page_url)
    return Base(page_url)


def _size(value: str) -> str | None:
    match = _SIZE.match(value)
    return match[1] if match else None


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
        for block in caption.css(_BLOCKS):
            block.insert_before(" ")
            block.insert_after(" ")
        text = caption.text()
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
