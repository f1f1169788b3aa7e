"""Captions and queries as sequences of words, so that they can be compared."""

import unicodedata

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")  # first word of a character's name
_METACLIP = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")})


class _Spacing(dict[int, str]):
    """What each character becomes under `includes`; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or 0xFE00 <= code <= 0xFE0F:
            spaced = ""
        elif category[0] in "PZC":
            spaced = " "
        elif category[0] == "S" or unicodedata.name(character, "").split(" ")[0] in _UNSPACED:
            spaced = f" {character} "
        else:
            spaced = character
        self[code] = spaced
        return spaced


_SPACING = _Spacing()


def split_words(text: str) -> list[str]:
    """Words of a text under `includes`."""
    if text.isascii():
        folded = text.lower()
    else:  # Unicode's compatibility caseless match: folding may denormalise, normalising may unfold
        folded = unicodedata.normalize("NFD", text).casefold()
        folded = unicodedata.normalize("NFKC", folded).casefold()
        folded = unicodedata.normalize("NFKC", folded)
    return folded.translate(_SPACING).split()


def normalise(text: str) -> str:
    """Words of a text under `includes`, joined by single spaces."""
    return " ".join(split_words(text))


def split_metaclip(text: str) -> list[str]:
    """Words of a text as MetaCLIP spaces it; two spaces hold an empty word."""
    return text.translate(_METACLIP).split(" ")
