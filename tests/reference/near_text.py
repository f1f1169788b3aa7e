"""The slow twin of `curate/near_text.py`: every text is compared with every other, by the pieces themselves."""

from diptych.curate.match import normalise


def pieces(text: str) -> set[str]:
    plain = f" {normalise(text)} "
    return {plain[i : i + 3] for i in range(len(plain) - 2)}


def similarity(a: str, b: str) -> float:
    first, second = pieces(a), pieces(b)
    return len(first & second) / len(first | second)
