"""What every tokenizer is: its face, its batches of ids, and the cleaning of texts.

`tokenizer.Tokenizer` is CLIP's own, `tokenizer_json.JsonTokenizer` any other, read from a tokenizer.json.
"""

import dataclasses
import html
import re
import reprlib
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ftfy
import numpy as np
import torch
from jaxtyping import Int32, Int64, Integer
from torch import Tensor

from diptych.errors import UsageError

SpecialTokens = Literal["escape", "parse"]
Clean = Literal["none", "whitespace", "lower", "canonicalize", "siglip"]

FILE_NAME = "diptych_tokenizer.json"

_LONG_NUMBER = re.compile("&#([0-9]{1000,});?")
_AND = re.compile("[&\uff06]")
_NESTED = re.compile("&(?:(?:amp|AMP|#0{0,20}38|#[xX]0{0,20}26);)+")
"""An "&" that was written as an entity, again and again."""
_LONG_TEXT = 5000
_DEEPEST = 16
"""Other ways to write entities in entities are undone so many times in a long text."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def repair(text: str) -> str:
    """Repair broken characters, then resolve HTML's entities twice."""
    return _unescape(_unescape(_repair(text)))


def _repair(text: str) -> str:
    """ftfy's `fix_text`. It takes entities in entities out one at a time, going over all of the text for each, so in a
    long text that is done before: in lines without a "<", those that ftfy does it in too."""
    if len(text) <= _LONG_TEXT or not _AND.search(text):
        return ftfy.fix_text(text)
    first = text.find("<")
    end = text.rfind("\n", 0, first) + 1 if first >= 0 else len(text)
    plain = text[:end]
    for _ in range(_DEEPEST):
        before, plain = plain, ftfy.fixes.unescape_html(_NESTED.sub("&", _AND.sub("&", plain)))
        if plain == before:
            break
    return ftfy.fix_text(plain + text[end:], unescape_html=False)


def _unescape(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # Python reads no decimal number of thousands of digits, which no character has anyway
        return html.unescape(_LONG_NUMBER.sub(lambda found: f"&#{found[1].lstrip('0')[:8] or 0};", text))


def is_plain(text: str) -> bool:
    """Whether `repair` leaves a text as it is, by a rule that is quick to ask: printable ASCII without "&".

    ftfy leaves the encoding of ASCII alone, and each of its other fixes needs a character outside ASCII, a control
    character (terminal escapes, line breaks) or an entity; unescaping needs an "&"; the only white space is the space.
    A "<" changes ftfy's mind about nothing but entities.
    """
    return text.isascii() and text.isprintable() and "&" not in text


def collapse(text: str) -> str:
    """Repair, and make all white space single spaces; case and punctuation stay."""
    return " ".join((text if is_plain(text) else repair(text)).split())


def canonicalize(text: str) -> str:
    """Repair, remove ASCII punctuation ("_" becomes a space), lower-case, collapse: as SigLIP's captions were."""
    text = text if is_plain(text) else repair(text)
    return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


def clean_siglip(text: str) -> str:
    """`canonicalize` as transformers' SiglipTokenizer has it: nothing is repaired, and "_" is removed."""
    return " ".join(text.replace("\u2581", " ").lower().translate(_PUNCTUATION).split())


CLEANERS: Mapping[Clean, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": collapse,
    "lower": lambda text: collapse(text).lower(),
    "canonicalize": canonicalize,
    "siglip": clean_siglip,
}
"""By the names that open_clip's configs have for them (its `tokenizer.get_clean_fn`), and transformers' own."""


class TokenBatch(NamedTuple):
    """Token ids of N captions without padding, each with its start and its end token."""

    ids: Int32[np.ndarray, " total"]
    """All captions, one after the other."""
    offsets: Int64[np.ndarray, " N+1"]
    """Caption i is `ids[offsets[i]:offsets[i + 1]]`."""
    truncated: int
    """How many captions were cut to fit the context length."""
    pad_id: int = 0
    """What rows are filled up with."""

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Tokens per caption, start and end token included."""
        return np.diff(self.offsets)

    def padded(self, context_length: int) -> Int64[Tensor, "N L"]:
        """Rows of `context_length` ids, filled up with `pad_id` (of CLIP also a "!": only the end token is an end)."""
        lengths = self.lengths
        if len(lengths) and lengths.max() > context_length:
            raise UsageError(
                f"a caption has {lengths.max()} tokens, more than context_length={context_length}; "
                "give encode_batch the same context_length"
            )
        rows = np.full((len(lengths), context_length), self.pad_id, dtype=np.int64)
        rows[np.arange(context_length) < lengths[:, None]] = self.ids  # a mask fills row by row, as `ids` runs
        return torch.from_numpy(rows)


class BaseTokenizer(ABC):
    """Captions to token ids and back. Subclasses are frozen dataclasses: equal when their fields are."""

    context_length: int
    special_tokens: SpecialTokens

    def __call__(
        self, texts: str | Iterable[str], context_length: int | None = None, *, truncate: bool = True
    ) -> Int64[Tensor, "N L"]:
        """One row of `context_length` ids per text: start token, text, end token, padding.

        A text that is too long keeps its first tokens and the end token; with `truncate=False` it raises
        ValueError. To learn how many were cut, take the two steps this call is made of:
        `batch = tokenizer.encode_batch(texts)`, `batch.truncated`, `batch.padded(tokenizer.context_length)`.
        """
        length = self.context_length if context_length is None else context_length
        return self.encode_batch(texts, length, truncate=truncate).padded(length)

    def with_context_length(self, context_length: int) -> "BaseTokenizer":
        """The same tokenizer for rows of another length."""
        return dataclasses.replace(self, context_length=context_length)  # pyright: ignore[reportArgumentType]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The highest id plus one, special tokens included."""

    @property
    @abstractmethod
    def end_token_id(self) -> int:
        """The token that ends a caption."""

    @property
    def pad_token_id(self) -> int:
        """What rows are filled up with."""
        return 0

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, hex."""

    @property
    def key(self) -> list[Any]:
        """All that ids depend on, as JSON values."""
        return [self.fingerprint, self.context_length, self.special_tokens]

    @abstractmethod
    def encode_batch(
        self, texts: str | Iterable[str], context_length: int | None = None, *, truncate: bool = True
    ) -> TokenBatch:
        """Ids of all texts, start and end tokens included, without padding, and the count of texts cut.

        `context_length` and `truncate` as in the call.
        """

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end token and however long."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """What one token stands for, written out."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | Integer[Tensor, " L"] | Integer[np.ndarray, " L"]) -> str:
        """Text of `ids` up to an end token, without start tokens."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write `diptych_tokenizer.json` and what belongs to it into `folder`; `Tokenizer.load` reads it back."""


def as_list(texts: str | Iterable[str]) -> list[str]:
    """One text or many as a list; anything that is no string is refused by its place."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise UsageError(f"texts is {type(texts).__name__}; give a string or a list of strings")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise UsageError(f"text {i} is {type(text).__name__}, {reprlib.repr(text)}; give a list of strings")
    return listed


def cannot_cut(number: int, tokens: int, context_length: int, text: str) -> UsageError:
    """The error for a text that must not be cut."""
    return UsageError(
        f"text {number} has {tokens} tokens, more than context_length={context_length}: {reprlib.repr(text)}; "
        "shorten it or pass truncate=True"
    )


def check_special_tokens(special_tokens: str) -> None:
    """Raise UsageError unless it is one of the two ways."""
    if special_tokens not in ("escape", "parse"):
        raise UsageError(f'special_tokens={special_tokens!r}; allowed: "escape", "parse"')
