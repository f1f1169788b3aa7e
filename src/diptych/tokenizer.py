"""Captions to token ids and back: CLIP's byte-pair encoding.

The rules are those of the released CLIP models (Radford et al. 2021, section 2.4; 49,408 ids: Table 18):

    text  -> repaired (ftfy), HTML unescaped twice, white space collapsed, lower case    `clean`
    text  -> pieces: contractions, runs of letters, single digits, runs of other signs   `_PIECE`
    piece -> UTF-8 bytes, the last one marked as the end, merged pair by pair            `bpe.merge_bytes`

After the ids of bytes and merges (see `bpe`) come the start token and last the end token: the text tower
finds the end of a caption by its highest id.

Nearly every word of a caption was seen before, so the work is done once per *chunk*, a run of characters
between spaces, and remembered. A batch then costs one join, one split, one dictionary look-up per chunk and
one join of the answers.
"""

import array
import dataclasses
import functools
import hashlib
import html
import importlib.resources
import json
import lzma
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ftfy
import numpy as np
import regex
import torch
from jaxtyping import Int32, Int64, Integer
from torch import Tensor

from diptych import files
from diptych.bpe import SINGLE_TOKENS, TokenPair, build_pairs, learn_merges, merge_bytes, spell_tokens
from diptych.errors import NotFoundError, UsageError

SpecialTokens = Literal["escape", "parse"]

FILE_NAME = "diptych_tokenizer.json"
_HEADER = {"format": "diptych tokenizer", "version": 1}

_START, _END = "<start_of_text>", "<end_of_text>"
# Ignoring case matters in lower-case text too: 's finds the long s (U+017F), as in the released models.
_PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PIECES = {
    "escape": regex.compile(_PIECE, regex.IGNORECASE),
    "parse": regex.compile(f"{_START}|{_END}|{_PIECE}", regex.IGNORECASE),
}

# The same rules for text that is ASCII and lower case, for the standard library's matcher, which is quicker.
_ASCII_PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ \t\n\v\f\ra-z0-9]+"
_ASCII_PIECES = {
    "escape": re.compile(_ASCII_PIECE),
    "parse": re.compile(f"{_START}|{_END}|{_ASCII_PIECE}"),
}

# A chunk of its own between two captions: clean text holds no line feed. Its two slots become the end token
# of one caption and the start token of the next.
_BORDER = "\n"
_LONG_NUMBER = re.compile("&#([0-9]{1000,});?")
_AND = re.compile("[&\uff06]")
_NESTED = re.compile("&(?:(?:amp|AMP|#0{0,20}38|#[xX]0{0,20}26);)+")
"""An "&" that was written as an entity, again and again."""
_LONG_TEXT = 5000
_DEEPEST = 16
"""Other ways to write entities in entities are undone so many times in a long text."""
_BORDER_IDS = np.array([-1, -1], dtype=np.int32).tobytes()


def clean(text: str) -> str:
    """Repair, unescape, collapse white space and lower-case `text`, in the order of the released models."""
    return " ".join(_unescape(_unescape(_repair(text))).split()).lower()


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


def clean_quickly(text: str) -> str:
    """`clean(text)`, except that spaces may be repeated or lead or trail: 100 times quicker on plain text.

    Plain is printable ASCII (U+0020..U+007E) without "&". `clean` only lower-cases it: ftfy leaves the
    encoding of ASCII alone, and each of its other fixes needs a character outside ASCII, a control character
    (terminal escapes, line breaks) or an entity; unescaping needs an "&"; the only white space is the space.
    A "<" changes ftfy's mind about nothing but entities.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.lower()
    return clean(text)


class TokenBatch(NamedTuple):
    """Token ids of N captions without padding, each with its start and its end token."""

    ids: Int32[np.ndarray, " total"]
    """All captions, one after the other."""
    offsets: Int64[np.ndarray, " N+1"]
    """Caption i is `ids[offsets[i]:offsets[i + 1]]`."""
    truncated: int
    """How many captions were cut to fit the context length."""

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Tokens per caption, start and end token included."""
        return np.diff(self.offsets)

    def padded(self, context_length: int) -> Int64[Tensor, "N L"]:
        """Rows of `context_length` ids, filled up with 0 (also a "!": only the end token is an end)."""
        lengths = self.lengths
        if len(lengths) and lengths.max() > context_length:
            raise UsageError(
                f"a caption has {lengths.max()} tokens, more than context_length={context_length}; "
                "give encode_batch the same context_length"
            )
        rows = np.zeros((len(lengths), context_length), dtype=np.int64)
        rows[np.arange(context_length) < lengths[:, None]] = self.ids  # a mask fills row by row, as `ids` runs
        return torch.from_numpy(rows)


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding with CLIP's text rules.

    >>> tokenizer = Tokenizer.clip()
    >>> tokenizer.encode("a cat")
    [320, 2368]
    >>> tokenizer(["a cat", "Two cats!"]).shape
    torch.Size([2, 77])

    Two tokenizers are equal when their fields are; `fingerprint` names the vocabulary alone.
    """

    merges: tuple[str, ...] = field(default_factory=lambda: _clip_merges(), repr=False)
    """Pairs to merge, best first, each written as two tokens with a space between: "c at</w>"; by default CLIP's."""
    context_length: int = 77
    """Default length of a row in tokens, start and end token included."""
    special_tokens: SpecialTokens = "escape"
    """A special token written out in a caption: "escape" reads it as ordinary text; "parse" takes
    <start_of_text> and <end_of_text> for the tokens, as open_clip does (which cuts the feature short)."""

    def __post_init__(self) -> None:
        _check_context_length(self.context_length)
        if self.special_tokens not in ("escape", "parse"):
            raise UsageError(f'special_tokens={self.special_tokens!r}; allowed: "escape", "parse"')
        _ = self._pairs  # a malformed merge is reported here, not at the first caption

    @classmethod
    def clip(cls, context_length: int = 77, special_tokens: SpecialTokens = "escape") -> "Tokenizer":
        """The released models' vocabulary: 48,894 merges, 49,408 ids. Built once per process."""
        return _clip_tokenizer(context_length, special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids, start and end token included."""
        return len(SINGLE_TOKENS) + len(self.merges) + 2

    @property
    def start_token_id(self) -> int:
        """The highest id but one."""
        return self.vocab_size - 2

    @property
    def end_token_id(self) -> int:
        """The highest id, which is how the text tower finds it."""
        return self.vocab_size - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the merges: equal fingerprints mean equal ids for every ordinary text."""
        return hashlib.sha256("\n".join(self.merges).encode()).hexdigest()

    def __call__(
        self, texts: str | Iterable[str], context_length: int | None = None, *, truncate: bool = True
    ) -> Int64[Tensor, "N L"]:
        """One row of `context_length` ids per text: start token, text, end token, zeros.

        A text that is too long keeps its first tokens and the end token; with `truncate=False` it raises
        ValueError. To learn how many were cut, take the two steps this call is made of:
        `batch = tokenizer.encode_batch(texts)`, `batch.truncated`, `batch.padded(tokenizer.context_length)`.
        """
        length = self.context_length if context_length is None else context_length
        return self.encode_batch(texts, length, truncate=truncate).padded(length)

    def encode_batch(
        self, texts: str | Iterable[str], context_length: int | None = None, *, truncate: bool = True
    ) -> TokenBatch:
        """Ids of all texts, start and end tokens included, without padding, and the count of texts cut.

        `context_length` and `truncate` as in the call.
        """
        length = self.context_length if context_length is None else context_length
        _check_context_length(length)
        texts = _as_list(texts)
        chunks = f" {_BORDER} ".join(["", *map(clean_quickly, texts), ""]).split(" ")
        stream = b"".join(map(self._chunks.__getitem__, chunks))
        # No caption ends at the first border, none starts at the last.
        ids = np.frombuffer(stream, dtype=np.int32)[1:-1].copy()

        slots = np.flatnonzero(ids == -1)  # start of 0, end of 0, start of 1, end of 1, ...
        starts, ends = slots[0::2], slots[1::2]
        ids[starts], ids[ends] = self.start_token_id, self.end_token_id
        offsets = np.append(starts, len(ids))
        too_long = np.flatnonzero(np.diff(offsets) > length)
        if len(too_long) and not truncate:
            first = int(too_long[0])
            raise UsageError(
                f"text {first} has {offsets[first + 1] - offsets[first]} tokens, more than "
                f"context_length={length}: {reprlib.repr(texts[first])}; shorten it or pass truncate=True"
            )
        if len(too_long):
            keep = np.ones(len(ids), dtype=bool)
            for caption in too_long:
                ids[offsets[caption] + length - 1] = self.end_token_id
                keep[offsets[caption] + length : offsets[caption + 1]] = False
            ids, offsets = ids[keep], np.append(0, np.minimum(np.diff(offsets), length).cumsum())
        return TokenBatch(ids, offsets, len(too_long))

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end token and however long."""
        (text,) = _as_list([text])
        stream = b"".join(map(self._chunks.__getitem__, clean_quickly(text).split(" ")))
        return np.frombuffer(stream, dtype=np.int32).tolist()

    def decode(self, ids: Iterable[int] | Integer[Tensor, " L"] | Integer[np.ndarray, " L"]) -> str:
        """Lower-case text of `ids`, a space after each piece; start tokens left out, up to an end token.

        Bytes that are no UTF-8 (a character that truncation cut in two) become U+FFFD.
        """
        text = bytearray()
        for token in map(int, ids):
            if token == self.end_token_id:
                break
            if not 0 <= token < self.vocab_size:
                raise UsageError(f"token id {token}; this vocabulary has the ids 0 to {self.vocab_size - 1}")
            text += self._token_bytes[token]
        return text.decode("utf-8", errors="replace").strip(" ")

    def save(self, folder: str | Path) -> Path:
        """Write `diptych_tokenizer.json` into `folder` and return its path; `load` reads it back."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {**_HEADER, "vocab_size": self.vocab_size, **dataclasses.asdict(self)}
        path.write_text(json.dumps(record, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read what `save` wrote into `folder`."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise NotFoundError(f"no {FILE_NAME} in {folder}; name a folder that Tokenizer.save wrote")
        try:
            record = files.read_json(path)
        except ValueError as error:
            raise UsageError(f"{path} is not JSON ({error}); save the tokenizer again") from error
        return _from_record(record, path)

    def __reduce__(self) -> tuple[Any, ...]:
        # Caches stay at home, and the stock vocabulary travels by name: every process has a copy of it.
        if self.merges is _clip_merges():
            return _clip_tokenizer, (self.context_length, self.special_tokens)
        return type(self), (self.merges, self.context_length, self.special_tokens)

    @functools.cached_property
    def _pairs(self) -> dict[TokenPair, int]:
        return build_pairs(self.merges)

    @functools.cached_property
    def _chunks(self) -> "ChunkCache":
        words = _clip_words() if self.merges is _clip_merges() else {}
        return ChunkCache(self._pairs, self.special_tokens, words)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return [*spell_tokens(self._pairs), b"", b""]


class ChunkCache(dict[str, bytes]):
    """Chunk of clean text -> its ids as int32 bytes, computed when first asked for.

    No piece holds white space and the pattern looks at nothing outside a piece, so the ids of a text are
    those of its chunks in a row; and a piece by itself is a chunk with the same ids.

    Bounded on any input: a long chunk is not kept, and a full cache starts again as it began, which costs a
    Zipf-distributed stream little and needs no lock (each dictionary operation is atomic).
    """

    MAX_ENTRIES = 131_072
    MAX_CHARACTERS = 48

    def __init__(
        self, pairs: Mapping[TokenPair, int], special_tokens: SpecialTokens, words: Mapping[str, bytes] | None = None
    ) -> None:
        """`words`: chunks whose ids are known without merging, as they are remembered here."""
        super().__init__(words or {})
        self._pairs, self._words = pairs, words or {}
        self._find_all_pieces, self._find_ascii_pieces = (
            patterns[special_tokens].findall for patterns in (_PIECES, _ASCII_PIECES)
        )
        start = len(SINGLE_TOKENS) + len(pairs)
        self._specials = {_START: [start], _END: [start + 1]} if special_tokens == "parse" else {}

    def __missing__(self, chunk: str) -> bytes:
        if chunk == _BORDER:
            packed = _BORDER_IDS
        elif len(pieces := self._find_pieces(chunk)) == 1:  # not always all of it: nothing matches U+0345
            ids = self._specials.get(pieces[0]) or merge_bytes(pieces[0].encode("utf-8"), self._pairs)
            packed = array.array("i", ids).tobytes()  # numpy takes five times as long for a few numbers
        else:
            packed = b"".join(map(self.__getitem__, pieces))  # "cat," and "cat" share the piece "cat"
        if len(chunk) <= self.MAX_CHARACTERS:
            if len(self) >= self.MAX_ENTRIES:
                self.clear()
                self.update(self._words)
            self[chunk] = packed
        return packed

    def _find_pieces(self, chunk: str) -> list[str]:
        """The pieces of a chunk of clean text."""
        if chunk.isascii():
            return [chunk] if chunk.isalpha() else self._find_ascii_pieces(chunk)
        return self._find_all_pieces(chunk)


def train_bpe(captions: Iterable[str], vocab_size: int, context_length: int = 77) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` ids from captions, with the same text rules.

    The result depends only on how often each piece occurs (ties: see `learn_merges`). Raises ValueError when
    the captions hold too few pairs.
    """
    wanted = vocab_size - len(SINGLE_TOKENS) - 2
    if wanted < 0:
        raise UsageError(f"vocab_size={vocab_size}; at least 514: 512 ids of bytes and 2 special tokens")
    merges = learn_merges(_count_pieces(captions), wanted)
    if len(merges) < wanted:
        raise UsageError(
            f"these captions hold pairs for {vocab_size - wanted + len(merges)} ids, not "
            f"vocab_size={vocab_size}; lower it or give more captions"
        )
    return Tokenizer(tuple(merges), context_length)


def _count_pieces(captions: Iterable[str]) -> Counter[bytes]:
    chunks: Counter[str] = Counter()
    for caption in [captions] if isinstance(captions, str) else captions:  # may be a stream larger than memory
        (text,) = _as_list([caption])
        chunks.update(clean_quickly(text).split(" "))
    pieces: Counter[bytes] = Counter()
    for chunk, count in chunks.items():
        for piece in _PIECES["escape"].findall(chunk):
            pieces[piece.encode("utf-8")] += count
    return pieces


def _as_list(texts: str | Iterable[str]) -> list[str]:
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


def _check_context_length(context_length: int) -> None:
    if context_length < 2:
        raise UsageError(f"context_length={context_length}; at least 2, for the start and the end token")


def _from_record(record: Any, path: Path) -> Tokenizer:
    known = {*_HEADER, "vocab_size", *(entry.name for entry in dataclasses.fields(Tokenizer))}
    if not isinstance(record, dict) or any(record.get(key) != value for key, value in _HEADER.items()):
        raise UsageError(f"{path} does not begin with {_HEADER}; give a file that this Tokenizer.save wrote")
    if record.keys() != known:
        odd = reprlib.repr(sorted(record.keys() ^ known))
        raise UsageError(f"{path}: wrong keys {odd}; allowed are {sorted(known)}")
    merges, context_length = record["merges"], record["context_length"]
    if not (
        isinstance(merges, list)
        and all(isinstance(merge, str) for merge in merges)
        and isinstance(context_length, int)
        and record["vocab_size"] == len(SINGLE_TOKENS) + len(merges) + 2
        and record["special_tokens"] in ("escape", "parse")
    ):
        raise UsageError(f"{path}: sizes, special_tokens and merges do not agree; save the tokenizer again")
    stock = _clip_merges()
    same = tuple(merges) == stock
    return Tokenizer(stock if same else tuple(merges), context_length, record["special_tokens"])


@functools.cache
def _clip_merges() -> tuple[str, ...]:
    packed = (importlib.resources.files("diptych") / "assets" / "clip_merges.txt.xz").read_bytes()
    return tuple(lzma.decompress(packed).decode("utf-8").removesuffix("\n").split("\n"))


@functools.cache
def _clip_words() -> dict[str, bytes]:
    """Words that are one token of the stock vocabulary, with their ids as int32 bytes.

    Each of them is what merging its bytes ends with: a test holds all of them.
    """
    start = len(SINGLE_TOKENS)
    ids = np.arange(start, start + len(_clip_merges()), dtype=np.int32).tobytes()
    words = (merge.replace(" ", "", 1) for merge in _clip_merges())
    return {
        word[:-4]: ids[4 * i : 4 * i + 4]
        for i, word in enumerate(words)
        if word.isascii() and word.endswith("</w>") and word[:-4].isalpha()
    }


@functools.cache
def _clip_tokenizer(context_length: int, special_tokens: SpecialTokens) -> Tokenizer:
    return Tokenizer(_clip_merges(), context_length, special_tokens)
