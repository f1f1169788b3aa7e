"""`diptych tokenizer`."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diptych.cli.output import counted, printable
from diptych.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from diptych.tokens import BaseTokenizer

_CONFIGS = ("config.json", "open_clip_config.json")
_COUNTED = 10_000
"""Captions whose tokens are counted after learning."""


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Learn a vocabulary of one's own from captions, for `diptych train --tokenizer`."""

    data: tuple[Path, ...]
    """Folders of shards, tars, or text files with a caption a line (UTF-8)."""
    out: Path
    """The new folder."""
    vocab_size: int = 8192
    """Ids: 512 of bytes, 2 special tokens, the rest learned."""
    context_length: int = 77
    """Tokens of a text, start and end token included."""

    def __call__(self) -> int:
        from diptych.files import make_folder
        from diptych.tokenizer import Tokenizer, train_bpe

        if (self.out / "diptych_tokenizer.json").exists():
            raise UsageError(f"{self.out} holds a tokenizer; name another --out")
        tokenizer = train_bpe(_read_captions(self.data), self.vocab_size, self.context_length)
        make_folder(self.out)
        path = tokenizer.save(self.out)
        captions = list(itertools.islice(_read_captions(self.data), _COUNTED))
        own, stock = (_mean_tokens(one, captions) for one in (tokenizer, Tokenizer.clip()))
        print(f"{tokenizer.vocab_size:,} ids: {path}")
        print(
            f"tokens a caption, of the first {counted(len(captions), 'caption')}: {own:.1f}; with OpenAI's vocabulary "
            f"of {Tokenizer.clip().vocab_size:,}: {stock:.1f}"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show how texts are cut into tokens."""

    tokenizer: Annotated[str, tyro.conf.Positional]
    """A tokenizer's folder (ours, or one with a tokenizer.json), a model of any kind that `diptych inspect` knows, or
    `clip`."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The texts."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __call__(self) -> int:
        tokenizer = _open(self.tokenizer)
        lengths = tokenizer.encode_batch(self.texts).lengths.tolist()
        around = len(tokenizer.encode_batch([""]).ids) - len(tokenizer.encode(""))
        rows = []
        for text, length in zip(self.texts, lengths, strict=True):
            ids = tokenizer.encode(text)
            pieces = [tokenizer.piece(token) for token in ids]
            rows.append(
                {"text": text, "tokens": length, "cut": len(ids) + around > length, "pieces": pieces, "ids": ids}
            )
        if self.json:
            facts = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
            print(json.dumps({**facts, "texts": rows}, indent=2, ensure_ascii=False))
            return 0
        print(f"{tokenizer.vocab_size:,} ids, texts of up to {tokenizer.context_length} tokens")
        for row in rows:
            print(f"{printable(row['text'])}  ({counted(row['tokens'], 'token')}{', cut' if row['cut'] else ''})")
            print("  " + " | ".join(map(printable, row["pieces"])))
            print("  " + " ".join(map(str, row["ids"])))
        return 0


def _open(name: str) -> "BaseTokenizer":
    """The tokenizer that a name means."""
    from diptych.tokenizer import Tokenizer
    from diptych.tokenizer_json import JSON, read_tokenizer
    from diptych.tokens import FILE_NAME

    if name == "clip":
        return Tokenizer.clip()
    folder = Path(name)
    if (folder / FILE_NAME).is_file():
        return Tokenizer.load(folder)
    if (folder / JSON).is_file() and not any((folder / config).is_file() for config in _CONFIGS):
        return read_tokenizer(folder, Tokenizer.clip().context_length)
    from diptych.checkpoint.layouts import open_checkpoint
    from diptych.errors import ActivationUnknownError

    try:
        return open_checkpoint(name).tokenizer
    except ActivationUnknownError:  # it does not matter here
        return open_checkpoint(name, activation="gelu").tokenizer


def _mean_tokens(tokenizer: "BaseTokenizer", captions: list[str]) -> float:
    """Tokens of a caption, without start and end."""
    return sum(len(tokenizer.encode(caption)) for caption in captions) / max(1, len(captions))


def _read_captions(data: tuple[Path, ...]) -> Iterator[str]:
    """Captions of all places, one after the other."""
    from diptych.embed.sources import TextSource
    from diptych.shards.dataset import load_dataset

    for path in data:
        if not path.exists():
            raise NotFoundError(f"no such file or folder: {path}")
        if path.is_dir() or path.suffix == ".tar":
            yield from load_dataset(path).captions
        else:
            lines = TextSource.open(path)
            yield from (row.content for row in lines.read(0, lines.rows) if isinstance(row.content, str))


COMMANDS: dict[str, Any] = {"train": Learn, "show": Show}
"""By name."""


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Learn a vocabulary of one's own, or see how texts are cut into tokens.

    Example: diptych tokenizer train --data captions.txt --out own
    """

    action: Annotated[Learn, tyro.conf.subcommand("train")] | Annotated[Show, tyro.conf.subcommand("show")]

    def __call__(self) -> int:
        return self.action()
