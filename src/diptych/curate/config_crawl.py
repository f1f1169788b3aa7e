"""How web pages become candidates, and which of them stay: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Candidates -> those whose text may be worth learning from."""

    folder: Path
    """Folder of candidates."""
    out: Path
    """Folder for what stays."""
    languages: tuple[str, ...] = ("en",)
    """Languages that stay, as two-letter codes; none: every language."""
    language_margin: float = 6.0
    """A text is dropped if another language is this much (in nats) more likely than each of these. 6 keeps 91 % of
    English texts of 15 to 30 characters and 20 % of others, 96 % and 10 % of those of 30 to 60."""
    min_characters: int = 5
    """Shortest text that stays."""
    max_characters: int = 1000
    """Longest text that stays."""
    min_words: int = 1
    """Fewest words; a character of a script without spaces counts as one."""
    max_words: int = 256
    """Most words."""
    min_letters: float = 0.4
    """Smallest share of letters among the characters that are not spaces."""
    file_names: bool = True
    """Drop texts that are a file name, an address or a camera's number."""
    boilerplate: bool = True
    """Drop texts of page furniture: logo, click to enlarge, facebook, image may contain, ..."""
    phrases: tuple[str, ...] = ()
    """More texts of page furniture, compared without case and punctuation."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_characters <= self.max_characters or not 0 <= self.min_words <= self.max_words:
            raise UsageError(
                f"lengths {self.min_characters}..{self.max_characters} characters and "
                f"{self.min_words}..{self.max_words} words must be two ranges; the smaller number comes first"
            )
        if not self.language_margin >= 0:
            raise UsageError(f"language_margin {self.language_margin} must be 0 or more; 6 is usual, 0 the strictest")
        if not 0 <= self.min_letters <= 1:
            raise UsageError(f"min_letters {self.min_letters} is not a share in [0, 1]; 0 lets any text through")
        for language in self.languages:
            if not (len(language) in (2, 3) and language.isascii() and language.islower()):
                raise UsageError(f"language {language!r} is not a code like en, de, zh; write ISO 639-1 codes")


Scope = Literal["image", "site", "all"]


@dataclass(frozen=True, kw_only=True)
class NearTextConfig:
    """Candidates -> those that are no copy, or near copy, of another."""

    folder: Path
    """Folder of candidates."""
    out: Path
    """Folder for what stays."""
    near: bool = True
    """Drop near copies too, not only pairs with the same picture address and text."""
    scope: Scope = "site"
    """Texts are near copies only within the same `image` address, the same `site` (host of the page), or in `all`."""
    similarity: float = 0.8
    """Texts that share this much of their three-letter pieces (Jaccard) are near copies."""
    hashes: int = 128
    """Hashes of a text's signature; more find near copies more surely."""
    seed: int = 0
    """Of the hashes, and of which copy stays."""
    buckets: int = 16
    """Parts the comparison is made in; each has to fit in memory. Does not change the outcome."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.similarity <= 1:
            raise UsageError(f"similarity {self.similarity} is not in [0.5, 1]; 0.8 finds what a reader calls a copy")
        if self.hashes < 16 or self.hashes % 16 or self.hashes > 1024:
            raise UsageError(f"hashes {self.hashes} is not a multiple of 16 up to 1024; use 128")
        if not 1 <= self.buckets <= 4096:
            raise UsageError(f"buckets {self.buckets} is not in 1..4096; use 16, or more if memory is short")
