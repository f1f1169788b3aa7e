"""The slow twin of `curate/match.py`: every entry is compared with every run of the text's tokens."""

from collections.abc import Callable, Sequence

from diptych.curate.match import normalise


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
    words: Callable[[str], list[str]] = lambda string: normalise(string).split()  # noqa: E731
    tokens = words(text) if rule == "includes" else metaclip_tokens(text)
    found: list[int] = []
    for number, query in enumerate(queries):
        entry = words(query) if rule == "includes" else query.split(" ")
        runs = range(len(tokens) - len(entry) + 1)
        if entry and any(tokens[start : start + len(entry)] == entry for start in runs):
            found.append(number)
    return found
