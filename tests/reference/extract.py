"""The slow twin of `curate/extract.py` for well-formed pages: the standard library's tokenizer, a list of open tags."""

import re
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin

BLOCKS = {"br", "p", "div", "li", "figure", "figcaption", "h2"}
VOID = {"img", "base", "meta", "br", "hr", "input", "link", "source", "image"}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.figures: list[dict] = []
        self.pictures: list[tuple[dict, dict | None]] = []
        self.base: str | None = None
        self.caption: dict | None = None

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(reversed(attrs))  # the first of two with one name counts
        self._end_word(tag)
        if tag == "base" and self.base is None:
            self.base = attributes.get("href")
        if "template" not in self.open and tag == "img":
            self.pictures.append((attributes, self.figures[-1] if self.figures else None))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures.append({"text": None})
        if tag == "figcaption" and self.figures and self.figures[-1]["text"] is None:
            self.figures[-1]["text"] = []
            self.caption = self.figures[-1]

    def _end_word(self, tag: str) -> None:
        if tag in BLOCKS and self.caption is not None and "template" not in self.open:
            self.caption["text"].append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._end_word(tag)
        if tag in self.open:
            while self.open.pop() != tag:
                pass
        if tag == "figure" and self.figures:
            self.figures.pop()
        if tag == "figcaption":
            self.caption = None

    def handle_data(self, data: str) -> None:
        if self.caption is not None and "template" not in self.open:
            self.caption["text"].append(data)


def find_pairs(html: str, page_url: str, lazy: list[str]) -> list[tuple[str, str]]:
    """Addresses and texts: alt, title and figcaption of every picture; `lazy` attributes and srcset win over src."""
    page = _Page()
    page.feed(html)
    page.close()
    base = urljoin(page_url, page.base) if page.base else page_url
    found = []
    for attributes, figure in page.pictures:
        texts = [attributes.get("alt"), attributes.get("title")]
        texts.append("".join(figure["text"]) if figure and figure["text"] is not None else "")
        address = _largest(attributes.get("srcset") or "")
        for name in [*lazy, "src"]:
            address = address or attributes.get(name) or ""
        url = urldefrag(urljoin(base, address.strip())).url
        for text in dict.fromkeys(" ".join(text.split()) for text in texts if text):
            if text and address and re.match("https?://", url):
                found.append((url, text))
    return found


def _largest(srcset: str) -> str:
    sized = []
    for part in re.split(r",\s+", srcset.strip()):
        match = re.fullmatch(r"(\S+)(?:\s+(\d+(?:\.\d+)?)[wx])?", part.strip())
        if match:
            sized.append((float(match[2] or 1), match[1]))
    return max(sized, key=lambda one: one[0])[1] if sized else ""
