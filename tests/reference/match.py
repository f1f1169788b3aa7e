"""The slow twin of `curate/match.py`: every entry is compared with every run of the text's tokens."""

import unicodedata
from collections.abc import Sequence

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER")


def plain_words(text: str) -> list[str]:
    """The words of `includes`, one character after the other."""
    text = unicodedata.normalize("NFD", text).casefold()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = ""
    for character in text:
        category = unicodedata.category(character)
        alone = category[0] == "S" or unicodedata.name(character, "?").split()[0] in UNSPACED
        if category == "Cf" or "\ufe00" <= character <= "\ufe0f":
            continue
        if category[0] in "PZC":
            spaced += " "
        else:
            spaced += f" {character} " if alone else character
    return spaced.split()


def metaclip_tokens(text: str) -> list[str]:
    """MetaCLIP's spacing, one replacement after the other."""
    text = f" {text} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        text = text.replace(blank, " ")
    return text.split(" ")[1:-1]


def find_queries(text: str, queries: Sequence[str], rule: str) -> list[int]:
    """Numbers of the queries whose tokens are a run of the text's."""
    tokens = plain_words(text) if rule == "includes" else metaclip_tokens(text)
    found: list[int] = []
    for number, query in enumerate(queries):
        entry = plain_words(query) if rule == "includes" else query.split(" ")
        runs = range(len(tokens) - len(entry) + 1)
        if entry and any(tokens[start : start + len(entry)] == entry for start in runs):
            found.append(number)
    return found
