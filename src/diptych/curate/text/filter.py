"""Candidates -> those whose text may be worth learning from. Each rule looks at one text alone and has a reason.

The language comes from py3langid: its model is in the wheel, so nothing is downloaded. It is unsure of short texts; a
text is dropped only if another language is more likely than each wanted one by `language_margin` nats. Names are of no
language, and what zero-shot classification is asked about, so that what is written like one is not judged.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from diptych.curate.rows import CANDIDATES, with_reason
from diptych.curate.text.config import FilterConfig
from diptych.curate.text.words import normalise
from diptych.errors import UsageError, install
from diptych.stage.folder import read_manifest
from diptych.stage.run import Engine, StageReport, tasks_of

TEXT_SHORT = "text_short"
TEXT_LONG = "text_long"
TEXT_WORDS = "text_words"
TEXT_LETTERS = "text_letters"
TEXT_DAMAGED = "text_damaged"
FILE_NAME = "file_name"
BOILERPLATE = "boilerplate"
LANGUAGE = "language"

_NAME_WORDS = 6
_JOINING = re.compile("an?|and|at|by|da|del?|der|di|do|du|et?|el|en|for|in|las?|le|los|of|on|the|und|v[ao]n|with|y")
_ENDING = r"\.(?:jpe?g|jfif|png|gif|webp|avif|svg|bmp|tiff?|ico|heic|cr2|nef|psd|pdf|mp4|html?|php|aspx?)"
_FILE_NAMES = re.compile(
    rf"""\S*{_ENDING}(?:\?\S*)?                            # name.jpg
    | (?:[^\s/\\]+[/\\]){{2,}}\S*                           # a/path/of/it
    | [\w\s()&',-]{{0,120}}{_ENDING}                       # Some name (2).jpg
    | (?:https?://|www\.|data:|javascript:)\S*             # an address
    | (?:img|dsc[fn]?|pict?|p|imag|image|photo|picture|screen\s?shot|screenshot|untitled|scan|file|wp|vid|gopr|dji|mvc|
        whatsapp\ image|unnamed|thumb(?:nail)?|pic)[\s_.#-]*\(?\d[\d\s_.:()-]*(?:at\ [\d.:]+(?:\ [ap]m)?)?
    | [0-9a-f]{{8}}[0-9a-f-]{{8,}}                         # a hash
    | [a-z0-9]+(?:_[a-z0-9]+){{2,}}                        # some_name_1024
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PHRASES = """
    logo | site logo | company logo | icon | image | images | picture | photo | photos | img | thumbnail | thumb
    banner | avatar | profile picture | profile photo | user avatar | gravatar | placeholder | placeholder image
    no image | no photo | image not available | no image available | no photo available | default image
    spacer | blank | pixel
    tracking pixel | advertisement | ad | ads | sponsored | loading | loading image | please wait | click to enlarge
    click for larger image | click here | click image to enlarge | enlarge image | view larger image | zoom | read more
    more | learn more | next | previous | prev | back | forward | home | menu | close | search | share | print | email
    e mail | download | play | pause | play video | video thumbnail | facebook | twitter | x | instagram | youtube
    linkedin | pinterest | tiktok | whatsapp | rss | rss feed | share on facebook | share on twitter | follow us
    like us on facebook | tweet | pin it | up | down | left | right | arrow | arrow right | arrow left | star | rating
    add to cart | buy now | cart | shopping cart | login | log in | sign in | sign up | subscribe | captcha
    powered by wordpress | creative commons license | w3c | valid html | valid css | get adobe reader
    get it on google play | download on the app store | app store | google play | your browser does not support
    image may contain | image for post | image result | post image | featured image | header image | background image
    hero image | cover image | slide | slide 1 | gallery image | untitled | null | undefined | none | n a | alt
    alt text | title | caption | note | tip | warning | caution | important | image loading | lazy loaded image
    map | flag
"""
_TO_BYTES = {ord(bytes([byte]).decode("cp1252", "ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)}
"""What windows-1252 has where latin-1 has control characters -> the byte, as a character of latin-1."""
_BOILERPLATE = frozenset(normalise(phrase) for line in _PHRASES.strip().splitlines() for phrase in line.split("|"))
_BEGINNINGS = (
    "image may contain ",
    "click to enlarge ",
    "click to view ",
    "click here to ",
    "share on ",
    "follow us on ",
    "no photo description available",
    "this image has an empty alt attribute",
)


@dataclass(frozen=True)
class Filter:
    """Stage: gives each candidate the reason of the first rule that its text breaks."""

    rules: FilterConfig

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Judge each text on its own."""
        judge = self.judge()
        for batch in batches:
            yield with_reason(batch, [judge(caption) for caption in batch.column("caption").to_pylist()])

    def judge(self) -> Callable[[str], str | None]:
        """What gives a text its reason, or None; a text that was judged lately is not judged again."""
        furniture = _BOILERPLATE | {normalise(phrase) for phrase in self.rules.phrases}
        speaks = _language_test(self.rules.languages, self.rules.language_margin) if self.rules.languages else None

        @lru_cache(maxsize=1 << 16)
        def judge(text: str) -> str | None:
            reason = self._judge_length(text)
            if reason is not None:
                return reason
            if self.rules.damaged and _is_damaged(text):
                return TEXT_DAMAGED
            if self.rules.file_names and _FILE_NAMES.fullmatch(text.strip()):
                return FILE_NAME
            if not self._has_letters(text):
                return TEXT_LETTERS
            plain = normalise(text)
            if not self.rules.min_words <= plain.count(" ") + 1 <= self.rules.max_words:
                return TEXT_WORDS
            if self.rules.boilerplate and (plain in furniture or plain.startswith(_BEGINNINGS)):
                return BOILERPLATE
            if speaks is None or (self.rules.names and _is_name(text)) or speaks(text):
                return None
            return LANGUAGE

        return judge

    def _judge_length(self, text: str) -> str | None:
        if len(text) < self.rules.min_characters:
            return TEXT_SHORT
        if len(text) > self.rules.max_characters:
            return TEXT_LONG
        return None

    def _has_letters(self, text: str) -> bool:
        written = [character for character in text if not character.isspace()]
        return bool(written) and sum(map(str.isalpha, written)) >= self.rules.min_letters * len(written)


def _is_damaged(text: str) -> bool:
    """Whether characters were lost (U+FFFD), or UTF-8 was read as latin-1 (`cafÃ©`)."""
    if text.isascii():
        return False
    try:
        return "\ufffd" in text or bool(text.translate(_TO_BYTES).encode("latin-1").decode())
    except UnicodeError:
        return False


def _is_name(text: str) -> bool:
    """Whether a text is a few words of Latin letters that are capitalised, numbers, or such as join names.

    >>> _is_name("Mona Lisa by Leonardo da Vinci"), _is_name("Ein rotes Auto")
    (True, False)
    """
    words = text.split()
    return (
        len(words) <= _NAME_WORDS
        and not text.endswith((".", "!", "?"))
        and all(
            ord(letter) < 0x250 for letter in text if letter.isalpha()
        )  # other scripts have no capitals, or are told
        and all(not word[0].islower() or _JOINING.fullmatch(word) for word in words)
        and any(word[0].isupper() for word in words)
    )


def _language_test(languages: tuple[str, ...], margin: float) -> Callable[[str], bool]:
    rank, known = _load_languages()
    unknown = sorted(set(languages) - known)
    if unknown:
        raise UsageError(f"languages {', '.join(unknown)} are not among those told apart: {', '.join(sorted(known))}")

    def speaks(text: str) -> bool:
        scores: list[tuple[str, float]] = rank(text)
        wanted = next(score for language, score in scores if language in languages)
        return scores[0][1] - wanted <= margin

    return speaks


@lru_cache(maxsize=1)
def _load_languages() -> tuple[Callable[[str], Any], frozenset[str]]:
    try:
        import py3langid
    except ImportError:
        raise UsageError(
            f"languages cannot be told apart without py3langid; {install('curate')}, or give no languages"
        ) from None
    return py3langid.rank, frozenset(language for language, _ in py3langid.rank("a"))


def run(config: FilterConfig, *, engine: Engine) -> StageReport:
    """Filter a folder of candidates."""
    stage = Filter(config)
    stage.judge()  # says at once if a language is unknown
    parent = read_manifest(config.folder).hash
    return engine.run_stage(stage, tasks_of(config.folder), config.out, config, schema=CANDIDATES, parent=parent)
