"""The slow twin of `curate/links.py`: `srcset` read character by character, in the HTML standard's own states."""

SPACE = " \t\n\f\r"


def split_srcset(srcset: str) -> list[tuple[str, list[str]]]:
    """Addresses, each with its descriptors."""
    found: list[tuple[str, list[str]]] = []
    rest = list(srcset)
    while True:
        while rest and rest[0] in SPACE + ",":
            rest.pop(0)
        if not rest:
            return found
        address = ""
        while rest and rest[0] not in SPACE:
            address += rest.pop(0)
        if address.endswith(","):
            found.append((address.rstrip(","), []))
            continue
        text, in_parentheses = "", False
        while rest and (in_parentheses or rest[0] != ","):
            if rest[0] in "()":
                in_parentheses = rest[0] == "("
            text += rest.pop(0)
        found.append((address, text.split()))
