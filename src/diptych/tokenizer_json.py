"""Captions to token ids by any other vocabulary: a `tokenizer.json`, which the `tokenizers` library reads.

    text  -> cleaned                          `tokens.CLEANERS`, as the family's captions were
    text  -> ids                              the file: normalizer, pieces, model
    ids   -> cut to the room there is, then its start and end tokens    the file's post-processor, or `Rules.template`

What transformers and open_clip add to a file is in `Rules`: values that are saved beside it. The library is imported
when the first such tokenizer is built; CLIP's own vocabulary needs nothing.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from diptych import files
from diptych.config import from_dict, to_dict
from diptych.errors import NotFoundError, UsageError
from diptych.tokens import (
    CLEANERS,
    FILE_NAME,
    BaseTokenizer,
    Clean,
    SpecialTokens,
    TokenBatch,
    as_list,
    cannot_cut,
    check_special_tokens,
)

if TYPE_CHECKING:
    import tokenizers

JSON = "tokenizer.json"
SETTINGS, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
MAX_BYTES = 256 << 20
"""Bytes of a tokenizer.json; XLM-V's, the largest of a published CLIP, has a quarter of it."""
_HEADER = {"format": "diptych tokenizer.json", "version": 1}
_TEXT = "$A"
_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What belongs to a family and does not stand in its tokenizer.json."""

    clean: Clean = "none"
    """What is done to a text before the file sees it."""
    lowercase: bool = False
    """Whether the file's normalizer is preceded by the library's lower-casing (SigLIP 2 in transformers)."""
    template: tuple[str, ...] | None = None
    """Tokens around a text, `$A`, instead of those that the file's post-processor puts: NLLB's language code."""
    pad: str
    """The token that rows are filled up with."""
    end: str
    """The token that ends a text."""
    drop: str | None = None
    """A token that becomes padding wherever it stands: BERT's [SEP] for CLIPA (open_clip's `strip_sep_token`)."""
    special: tuple[str, ...] = ()
    """Tokens of the vocabulary that are special though the file does not say so."""


@dataclass(frozen=True)
class JsonTokenizer(BaseTokenizer):
    """A tokenizer.json with the rules of a family.

    >>> tokenizer = read_tokenizer("ViT-B-16-SigLIP", 64, clean="canonicalize")     # doctest: +SKIP
    >>> tokenizer(["a cat", "Two cats!"]).shape                                     # doctest: +SKIP
    torch.Size([2, 64])
    """

    json: bytes = field(repr=False)
    """The file."""
    rules: Rules
    context_length: int = 77
    """Default length of a row in tokens, start and end token included."""
    special_tokens: SpecialTokens = "escape"
    """A special token written out in a caption: "escape" reads it as ordinary text, "parse" takes it for the token, as
    transformers and open_clip do."""

    def __post_init__(self) -> None:
        check_special_tokens(self.special_tokens)
        self._check_length(self.context_length)
        _ = self._end_id, self._pad_id, self._drop_id

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return self._built.size

    @property
    def end_token_id(self) -> int:
        """The token that ends a caption."""
        return self._end_id

    @property
    def pad_token_id(self) -> int:
        """What rows are filled up with."""
        return self._pad_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.json).hexdigest()

    @property
    def key(self) -> list[Any]:
        """All that ids depend on, as JSON values."""
        return [*super().key, to_dict(self.rules)]

    def encode_batch(
        self, texts: str | Iterable[str], context_length: int | None = None, *, truncate: bool = True
    ) -> TokenBatch:
        """Ids of all texts, start and end tokens included, without padding, and the count of texts cut.

        A text that is too long loses its last tokens, never those that are put around it.
        """
        length = self.context_length if context_length is None else context_length
        self._check_length(length)
        texts = as_list(texts)
        before, after = self._around
        rows, room = self._encode(texts), length - len(before) - len(after)
        cut = [i for i, row in enumerate(rows) if len(row) > room]
        if cut and not truncate:
            tokens = len(rows[cut[0]]) + len(before) + len(after)
            raise cannot_cut(cut[0], tokens, length, texts[cut[0]])
        whole = [[*before, *row[:room], *after] for row in rows]
        offsets = np.fromiter(itertools.accumulate(map(len, whole), initial=0), np.int64, len(whole) + 1)
        ids = np.fromiter(itertools.chain.from_iterable(whole), np.int32, int(offsets[-1]))
        if self._drop_id is not None:
            ids[ids == self._drop_id] = self._pad_id
        return TokenBatch(ids, offsets, len(cut), self._pad_id)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end token and however long."""
        return self._encode(as_list([text]))[0]

    def piece(self, token: int) -> str:
        """What one token stands for, as its file writes it."""
        return str(self._built.backend.id_to_token(token))

    def decode(self, ids: Iterable[int] | Integer[Tensor, " L"] | Integer[np.ndarray, " L"]) -> str:
        """Text of `ids` up to an end token, special tokens left out."""
        tokens = list(itertools.takewhile(lambda token: token != self._end_id, map(int, ids)))
        if odd := [token for token in tokens if not 0 <= token < self.vocab_size]:
            raise UsageError(f"token id {odd[0]}; this vocabulary has the ids 0 to {self.vocab_size - 1}")
        with _one_line(f"this {JSON}"):
            return self._built.backend.decode(tokens, skip_special_tokens=True).strip(" ")

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json and, with the rules, `diptych_tokenizer.json`; return the path of the latter."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / JSON).write_bytes(self.json)
        rules = {"context_length": self.context_length, "special_tokens": self.special_tokens, **to_dict(self.rules)}
        record = {**_HEADER, "vocab_size": self.vocab_size, "sha256": self.fingerprint, "rules": rules}
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def wrote(record: Any) -> bool:
        """Whether a diptych_tokenizer.json is one of these."""
        return isinstance(record, dict) and record.get("format") == _HEADER["format"]

    @classmethod
    def from_record(cls, record: Mapping[str, Any], path: Path) -> "JsonTokenizer":
        """The tokenizer of which `save` wrote `record` to `path`, and the file beside it."""
        known = {*_HEADER, "vocab_size", "sha256", "rules"}
        if any(record.get(key) != value for key, value in _HEADER.items()):
            raise UsageError(f"{path} does not begin with {_HEADER}; this diptych does not read it")
        if record.keys() != known or not isinstance(record["rules"], dict):
            raise UsageError(f"{path}: wrong keys {sorted(record.keys() ^ known)[:5]}; allowed are {sorted(known)}")
        rules, data = dict(record["rules"]), _read(path.parent / JSON)
        context_length, special_tokens = rules.pop("context_length", None), rules.pop("special_tokens", None)
        if type(context_length) is not int or special_tokens not in ("escape", "parse"):
            raise UsageError(f"{path}: context_length or special_tokens makes no sense; save the tokenizer again")
        try:
            tokenizer = cls(data, from_dict(Rules, rules), context_length, special_tokens)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if record["sha256"] != tokenizer.fingerprint or record["vocab_size"] != tokenizer.vocab_size:
            raise UsageError(f"{path.parent / JSON} is not the file that {path.name} was written for")
        return tokenizer

    @functools.cached_property
    def _built(self) -> "_Built":
        return _build(self.json, self.rules.special, self.rules.lowercase, self.special_tokens == "escape")

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids before and after a text."""
        if self.rules.template is None:
            return self._built.around
        if self.rules.template.count(_TEXT) != 1:
            raise UsageError(f"the template {self.rules.template} needs one {_TEXT}, the text")
        place = self.rules.template.index(_TEXT)
        ids = [0 if token == _TEXT else self._id(token) for token in self.rules.template]
        return ids[:place], ids[place + 1 :]

    @functools.cached_property
    def _end_id(self) -> int:
        return self._id(self.rules.end)

    @functools.cached_property
    def _pad_id(self) -> int:
        return self._id(self.rules.pad)

    @functools.cached_property
    def _drop_id(self) -> int | None:
        return None if self.rules.drop is None else self._id(self.rules.drop)

    def _id(self, token: str) -> int:
        found = self._built.backend.token_to_id(token)
        if found is None:
            raise UsageError(f"this {JSON} has no token {token[:80]!r}")
        return found

    def _check_length(self, context_length: int) -> None:
        least = max(1, sum(map(len, self._around)))
        if context_length < least:
            raise UsageError(f"context_length={context_length}; at least {least}, for what stands around a text")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        clean = CLEANERS[self.rules.clean]
        ready = [_without_surrogates(clean(text)) for text in texts]
        with _one_line(f"this {JSON}"):
            rows = [one.ids for one in self._built.backend.encode_batch_fast(ready, add_special_tokens=False)]
        if self.special_tokens == "parse":
            return rows
        # The library spells out what it would have matched, but Unigram models have these tokens as pieces too.
        return [row if self._reserved.isdisjoint(row) else self._without_reserved(row) for row in rows]

    def _without_reserved(self, row: list[int]) -> list[int]:
        return [token for token in row if token not in self._reserved]

    @functools.cached_property
    def _reserved(self) -> set[int]:
        """Ids that mean something to the text tower, so that no text may hold them."""
        return {*itertools.chain(*self._around), self._end_id, self._pad_id}

    def __reduce__(self) -> tuple[Any, ...]:  # what was built stays at home
        return type(self), (self.json, self.rules, self.context_length, self.special_tokens)


@dataclass(frozen=True)
class _Built:
    """A file at work."""

    backend: "tokenizers.Tokenizer"
    size: int
    around: tuple[list[int], list[int]]


@functools.lru_cache(maxsize=4)  # half a second for a small file, seconds for a quarter of a million tokens
def _build(data: bytes, special: tuple[str, ...], lowercase: bool, escape: bool) -> _Built:
    import tokenizers
    from tokenizers import normalizers

    with _one_line(f"this {JSON}"):
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, tokenizers.models.BPE) and backend.model.dropout:
            raise ValueError("its merges drop out at random")
        backend.add_special_tokens([tokenizers.AddedToken(one, special=True, normalized=False) for one in special])
        if lowercase:
            before = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
        backend.encode_special_tokens = escape
        size = backend.get_vocab_size(with_added_tokens=True)
        if None in map(backend.id_to_token, range(size)):  # numbers are left out
            size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < size < 1 << 31:
            raise ValueError("it has no tokens that rows can hold")
        return _Built(backend, size, _find_around(backend))


def _find_around(backend: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """Ids that the file's post-processor puts before and after a text."""
    text, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a")
    before = len(list(itertools.takewhile(bool, whole.special_tokens_mask)))
    after = before + len(text)
    if whole.ids[before:after] != text or not all(whole.special_tokens_mask[after:]):
        raise ValueError("its post-processor does more than put tokens around a text")
    return whole.ids[:before], whole.ids[after:]


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What the library says of a file, as an error of ours."""
    try:
        yield
    except ImportError:
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{what} cannot be used: {reason or type(error).__name__}") from None


def _without_surrogates(text: str) -> str:
    """Half characters, which have no UTF-8, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- a folder of transformers' files ----------------------------------------------------------------------------------

_FAIRSEQ = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
_SPECIALS_OF: Mapping[str, Mapping[str, str]] = {
    "BertTokenizer": {"sep": "[SEP]", "cls": "[CLS]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"},
    **dict.fromkeys(("XLMRobertaTokenizer", "NllbTokenizer", "RobertaTokenizer"), _FAIRSEQ),
    **dict.fromkeys(("GemmaTokenizer", "Siglip2Tokenizer"), _GEMMA),
    "T5Tokenizer": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}
"""Special tokens that transformers' classes have where no file names them."""
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_tokenizer(
    folder: str | Path,
    context_length: int,
    *,
    clean: Clean = "none",
    strip_sep_token: bool = False,
    language: str | None = None,
    special_tokens: SpecialTokens = "escape",
) -> JsonTokenizer:
    """A tokenizer as transformers or open_clip makes it of tokenizer.json and tokenizer_config.json in a folder.

    `clean`, `strip_sep_token` and `language` are open_clip's `tokenizer_kwargs` (its default is `clean="whitespace"`).
    """
    folder = Path(folder)
    settings = {**_read_settings(folder / SPECIALS), **_read_settings(folder / SETTINGS)}
    kind = "BertTokenizer" if _is_wordpiece(folder) else str(settings.get("tokenizer_class")).removesuffix("Fast")
    data = _build_wordpiece(folder, settings) if _is_wordpiece(folder) else _read(folder / JSON)
    usual = _SPECIALS_OF.get(kind) or ({} if "pad_token" in settings else _find_specials(data))
    named = {name: _content(settings.get(f"{name}_token", usual.get(name))) for name in _NAMES}
    pad, end = named["pad"], named["eos"] or named["sep"]
    if pad is None or end is None:
        raise UsageError(f"{folder / SETTINGS} names no {'pad_token' if pad is None else 'eos_token or sep_token'}")
    template = None
    if kind == "NllbTokenizer":
        code = language or settings.get("src_lang") or "eng_Latn"
        template = (_TEXT, end, code) if settings.get("legacy_behaviour") else (code, _TEXT, end)
    elif language is not None:
        raise UsageError(f"{folder} has one way for all languages; only NLLB's tokenizer is told a language")
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    special = tuple(dict.fromkeys(token for token in (*named.values(), *extra) if token))
    rules = Rules(
        clean="siglip" if kind == "SiglipTokenizer" and clean == "none" else clean,
        lowercase=kind == "Siglip2Tokenizer",
        template=template,
        pad=pad,
        end=end,
        drop=named["sep"] if strip_sep_token else None,
        special=special,
    )
    return JsonTokenizer(data, rules, context_length, special_tokens)


def _read(path: Path) -> bytes:
    if not path.is_file():
        others = [name for name in _SENTENCEPIECE if (path.parent / name).is_file()]
        has = f"it has {others[0]} only, which diptych does not read" if others else "it has none"
        raise NotFoundError(
            f"{path.parent} needs a {JSON}: {has}; AutoTokenizer.from_pretrained(...).save_pretrained(...) of "
            "transformers writes one"
        )
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} has more than {MAX_BYTES:,} bytes; that is no vocabulary of a text tower")
    return data


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = files.read_json(path)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({str(error)[:200]})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path} holds no settings: it is no JSON object")
    return record


def _find_specials(data: bytes) -> Mapping[str, str]:
    """The special tokens of the class that a vocabulary is of, if its folder names neither (bert-base-uncased)."""
    known = _build(data, (), False, True).backend.token_to_id
    return next((names for names in _SPECIALS_OF.values() if None not in map(known, names.values())), {})


def _content(token: Any) -> str | None:
    """A token, written out or as an object with flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _is_wordpiece(folder: Path) -> bool:
    """Whether a folder holds BERT's list of words alone (Chinese CLIP)."""
    return not (folder / JSON).is_file() and (folder / "vocab.txt").is_file()


def _build_wordpiece(folder: Path, settings: Mapping[str, Any]) -> bytes:
    """BERT's rules around a vocab.txt, as transformers' BertTokenizer has them, as a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = _read(folder / "vocab.txt").decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    vocabulary = {line: i for i, line in enumerate(lines)}
    names = {name: _content(settings.get(f"{name}_token")) or f"[{name.upper()}]" for name in ("cls", "sep", "unk")}
    if missing := [token for token in names.values() if token not in vocabulary]:
        raise UsageError(f"{folder / 'vocab.txt'} is no vocabulary of BERT: it has no {missing[0]}")
    built = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk"]))
    built.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True) is True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is True,
        strip_accents=settings.get("strip_accents"),
    )
    built.pre_tokenizer, built.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    built.post_processor = processors.TemplateProcessing(
        single=f"{names['cls']} {_TEXT} {names['sep']}",
        special_tokens=[(token, vocabulary[token]) for token in (names["cls"], names["sep"])],
    )
    return built.to_str().encode()
