"""Settings of the stages that look at captions alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError


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
    names: bool = True
    """Keep what is written like a name (`Mona Lisa by Leonardo da Vinci`), whatever its language: up to six words, each
    capitalised, a number, or one that joins names."""
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
    damaged: bool = True
    """Drop texts with lost characters (U+FFFD), and UTF-8 that was read as latin-1."""
    file_names: bool = True
    """Drop texts that are a file name, an address or a camera's number."""
    boilerplate: bool = True
    """Drop boilerplate captions: logo, click to enlarge, facebook, image may contain, ..."""
    phrases: tuple[str, ...] = ()
    """More boilerplate captions, compared without case and punctuation."""

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
    scope: Scope = "image"
    """Texts are near copies only within the same `image` address, the same `site` (host of the page), or in `all`.
    Texts of different pictures are alike and mean it: Henry VII and Henry VIII, the shirt in red and in blue."""
    similarity: float = 0.8
    """Texts that share this much of their three-letter pieces (Jaccard) are near copies."""
    hashes: int = 128
    """Hashes of a text's signature; more find near copies more surely."""
    seed: int = 0
    """Seed of the hashes, and of which copy stays."""
    buckets: int = 16
    """Parts the comparison is made in; each has to fit in memory. Does not change the outcome."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.similarity <= 1:
            raise UsageError(f"similarity {self.similarity} is not in [0.5, 1]; 0.8 finds what a reader calls a copy")
        if self.hashes < 16 or self.hashes % 16 or self.hashes > 1024:
            raise UsageError(f"hashes {self.hashes} is not a multiple of 16 up to 1024; use 128")
        if not 1 <= self.buckets <= 4096:
            raise UsageError(f"buckets {self.buckets} is not in 1..4096; use 16, or more if memory is short")
