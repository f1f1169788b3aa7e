"""What a site says about robots: robots.txt (RFC 9309) and the headers that come with a picture.

`parse_robots` reads a file into the rules of one product name; `Rules.allows` answers for a path. The most specific
rule wins, counted in octets; of two alike, the one that allows. `*` stands for anything, `$` at the end for the end.

`opts_out` reads X-Robots-Tag (words for everybody, or for a product by name), TDMRep's `tdm-reservation: 1` and the
`Content-Usage` header of the IETF's AI preferences.
"""

import email.utils
import re
import urllib.parse
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

MAX_ROBOTS_BYTES = 500 << 10
"""What is read of a robots.txt; the RFC asks for at least this much."""
MAX_CRAWL_DELAY = 30.0
"""Seconds; a longer Crawl-delay is taken as this."""

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PRODUCT = re.compile(r"[a-zA-Z_-]+|\*")
_MISSPELLED = {
    **dict.fromkeys(("useragent", "user agent"), "user-agent"),
    **dict.fromkeys(("dissallow", "dissalow", "disalow", "diasllow", "disallaw"), "disallow"),
}
"""Keys that RFC 9309 lets a crawler forgive, and Google's parser does."""
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_RESERVED_USES = ("train-ai", "ai", "tdm")


@dataclass(frozen=True)
class Rules:
    """What one site allows one product."""

    rules: tuple[tuple[str, bool], ...] = ()
    """(pattern, allowed)."""
    crawl_delay: float = 0.0
    """Seconds between two requests."""
    reachable: bool = True
    """False if robots.txt could not be read although it may exist: then everything is forbidden for now."""

    def allows(self, path: str) -> bool:
        """Whether a path (with its query) may be asked."""
        if not self.reachable:
            return False
        path = _normal(path)
        if path == "/robots.txt":
            return True
        best = max(((len(pattern), allowed) for pattern, allowed in self.rules if matches(pattern, path)), default=None)
        return best is None or best[1]


ALLOW_ALL = Rules()
UNREACHABLE = Rules(reachable=False)


def parse_robots(text: str, product: str) -> Rules:
    """The rules for a product name: of all groups that name it, or else of those for everybody."""
    mine: list[tuple[str, bool]] = []
    everybody: list[tuple[str, bool]] = []
    delays: dict[str, float] = {}
    named = False
    agents: set[str] = set()
    in_rules = True
    for key, value in _lines(text):
        if key == "user-agent":
            if in_rules:
                agents, in_rules = set(), False
            if found := _PRODUCT.match(value):
                agents.add(found[0].lower())
            named |= product.lower() in agents
            continue
        if key not in ("allow", "disallow", "crawl-delay"):
            continue  # an unknown line, as Sitemap, does not end a run of user-agents
        in_rules = True
        for agent, rules in ((product.lower(), mine), ("*", everybody)):
            if agent not in agents:
                continue
            if key == "crawl-delay":
                delays.setdefault(agent, _seconds(value))
            elif value:  # an empty Disallow forbids nothing
                rules.append((_normal(value), key == "allow"))
    agent = product.lower() if named else "*"
    return Rules(tuple(mine if named else everybody), delays.get(agent, 0.0))


def _lines(text: str) -> Iterable[tuple[str, str]]:
    for line in re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")):
        key, colon, value = line.partition("#")[0].partition(":")
        if colon:
            key = key.strip().lower()
            yield _MISSPELLED.get(key, key), value.strip()


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return min(seconds, MAX_CRAWL_DELAY) if seconds > 0 else 0.0


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches the beginning of a path; linear in both, unlike a regular expression."""
    to_end = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    place = len(first)
    if to_end:
        if not rest:
            return place == len(path)
        *rest, last = rest
    for piece in rest:
        found = path.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return not to_end or (path.endswith(last) and len(path) - len(last) >= place)


def _normal(path: str) -> str:
    """Percent-encode what is not ASCII, decode what need not be encoded, so that spellings compare."""
    out, octets, place = [], path.encode("utf-8", "surrogatepass"), 0
    while place < len(octets):
        octet = octets[place]
        if octet == 0x25 and re.fullmatch(rb"[0-9a-fA-F]{2}", octets[place + 1 : place + 3]):
            octet = int(octets[place + 1 : place + 3], 16)
            out.append(chr(octet) if octet in _UNRESERVED else f"%{octet:02X}")
            place += 3
            continue
        out.append(chr(octet) if 0x20 < octet < 0x7F else urllib.parse.quote_from_bytes(bytes([octet])))
        place += 1
    return "".join(out)


def opts_out(
    headers: Iterable[tuple[str, str]], product: str, words: Collection[str], now: datetime | None = None
) -> str | None:
    """The first statement in the headers that keeps a picture out of training data, or None."""
    for name, value in headers:
        match name.lower():
            case "x-robots-tag":
                found = _read_tag(value, product, words, now or datetime.now(UTC))
            case "tdm-reservation":
                found = value if value.strip() == "1" else None
            case "content-usage":
                uses = {part.partition(";")[0].replace(" ", "").lower() for part in value.split(",")}
                found = value if any(f"{use}=n" in uses for use in _RESERVED_USES) else None
            case _:
                found = None
        if found is not None:
            return f"{name}: {found}"
    return None


def _read_tag(value: str, product: str, words: Collection[str], now: datetime) -> str | None:
    """One X-Robots-Tag line: `noai, noindex` or `product: noai, otherproduct: noindex`."""
    for_us = True
    for part in _directives(value):
        head, colon, rest = part.partition(":")
        head = head.strip().lower()
        if colon and head not in _WITH_VALUE and _PRODUCT.fullmatch(head):
            for_us = head in ("*", product.lower())
            head, colon, rest = (text.strip().lower() for text in rest.partition(":"))
        if not for_us:
            continue
        if head in words or (head == "none" and "noindex" in words):
            return head
        if head == "unavailable_after" and "noindex" in words and _is_past(rest, now):
            return part
    return None


def _directives(value: str) -> list[str]:
    """Split at commas and semicolons, but not at the one inside a date: Sunday, 25-Jun-2023 15:00:00 GMT."""
    parts: list[str] = []
    for part in re.split("[,;]", value):
        if parts and "unavailable_after" in parts[-1].lower() and re.match(r"\s*\d", part):
            parts[-1] += "," + part
        else:
            parts.append(part.strip())
    return parts


def _is_past(text: str, now: datetime) -> bool:
    try:
        moment = email.utils.parsedate_to_datetime(text.strip())
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            return False
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) < now
