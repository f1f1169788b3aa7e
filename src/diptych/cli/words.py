"""How the commands put numbers into words."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, of which there may be one.

    >>> counted(1, "input"), counted(2000, "input")
    ('1 input', '2,000 inputs')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
