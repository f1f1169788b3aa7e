"""How web pages become candidates, and which of them stay: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path

from diptych.errors import UsageError

LAZY = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-original-src", "data-hi-res-src")
"""Attributes in which pages keep the address of a picture that is loaded when it is scrolled to."""
OPT_OUTS = ("noai", "noimageai", "noml", "noindex", "noimageindex")
"""Words of a robots tag or header that keep a page out of training data."""


@dataclass(frozen=True, kw_only=True)
class CrawlConfig:
    """Web pages -> candidates: every picture with a text about it."""

    inputs: tuple[str, ...]
    """WARC, WAT and HTML files (gzipped or not), folders or `.paths` lists of them; paths or fsspec URLs."""
    out: Path
    """Folder for the candidates."""
    prefix: str = ""
    """Where the files of a `.paths` list lie, for example https://data.commoncrawl.org/ ."""
    pages_at: str = ""
    """URL under which plain HTML files were found; without it their relative addresses lead nowhere."""
    texts: tuple[str, ...] = ("alt", "title", "figcaption")
    """What is taken as a text about a picture: `figcaption`, or an attribute of `img`. Each distinct one is a pair."""
    lazy: tuple[str, ...] = LAZY
    """Attributes that win over `src` as the picture's address; the first one present."""
    srcset: bool = True
    """Take the largest candidate of `srcset` (or `data-srcset`) over `src`."""
    opt_outs: tuple[str, ...] = OPT_OUTS
    """A page whose robots tag or X-Robots-Tag header has one of these words is left out; `nofollow` is another."""
    page_bytes: int = 8 << 20
    """A page larger than this, unpacked, is left out."""
    page_seconds: float = 5.0
    """Seconds of processor time that parsing one page may take."""
    parser_bytes: int = 1 << 30
    """Memory that the parser's process may take."""
    files_per_task: int = 256
    """Plain HTML files of a task; an archive is a task of its own."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UsageError("inputs is empty; name a WARC, WAT or HTML file, or a folder of them")
        if not self.texts:
            raise UsageError("texts is empty; a pair needs a text, for example --texts alt title figcaption")
        if self.page_bytes < 1 or self.files_per_task < 1:
            raise UsageError(
                f"page_bytes {self.page_bytes} and files_per_task {self.files_per_task} must be 1 or more; "
                "leave them out for the defaults"
            )
        if not self.page_seconds > 0 or self.parser_bytes < 128 << 20:
            raise UsageError(
                f"page_seconds {self.page_seconds} must be above 0 and parser_bytes {self.parser_bytes} at least "
                f"{128 << 20}; leave them out for the defaults"
            )
        if self.pages_at and not self.pages_at.startswith(("http://", "https://")):
            raise UsageError(f"pages_at {self.pages_at!r} is not an http(s) URL; for example https://example.org/docs/")
