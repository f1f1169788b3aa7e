"""How pictures are fetched, filtered and compared: frozen values, nothing heavy imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.errors import UsageError

OPT_OUTS = ("noai", "noimageai", "noml", "noindex", "noimageindex")
"""Words of an X-Robots-Tag header that keep a picture out; `none` stands for noindex."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Pairs with the addresses of pictures -> pairs with pictures."""

    folder: Path
    """Folder of pairs, as `balance` leaves it (or `filter`, `match`)."""
    out: Path
    """Folder for the pairs that have a picture, the ledger and the bytes as they came."""
    contact: str
    """Web page or e-mail address of who runs this; every request names it, so that a site can complain."""
    product: str = "diptych"
    """Name that robots.txt and X-Robots-Tag may address; every request begins with it."""
    concurrency: int = 64
    """Pictures under way at once in each process; each may hold `max_bytes` in memory."""
    per_host: int = 2
    """Connections to one host at a time."""
    partitions: int = 1
    """Processes that fetch, hosts split among them; fixed once a folder is begun."""
    deadline: float = 30.0
    """Seconds for one picture in all, redirects included."""
    connect_timeout: float = 8.0
    """Seconds until a connection stands."""
    read_timeout: float = 10.0
    """Seconds without a byte."""
    max_bytes: int = 16 << 20
    """Larger pictures are given up while they arrive; counts what is unpacked, too."""
    max_pixels: int = 100_000_000
    """Pictures with more are refused from their header alone."""
    max_redirects: int = 5
    """Redirects followed; each new address is checked like the first."""
    ports: tuple[int, ...] = (80, 443)
    """Ports that may be asked."""
    allow_host: tuple[str, ...] = ()
    """host:port of this machine that may be asked although its address is not public, for example 127.0.0.1:8000."""
    robots: bool = True
    """Obey robots.txt. Off only for hosts that are yours."""
    opt_outs: tuple[str, ...] = OPT_OUTS
    """Words of X-Robots-Tag that keep a picture out."""
    attempts: int = 3
    """Tries of a failure that may pass (a name not found, a timeout, 429, 5xx), in one run."""
    backoff: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    max_wait: float = 60.0
    """Longest pause that a host may ask for by Retry-After; if it asks for more, a later run tries again."""
    dead_after: int = 8
    """Connections to a host that fail in a row before the rest of it waits for a later run."""
    retry: Literal["transient", "failed", "none"] = "transient"
    """Which failures of earlier runs are tried again: those that may have passed, all, or none."""
    known_hashes: tuple[Path, ...] = ()
    """Lists of pictures that must not be stored: a line each, MD5, SHA-1 or SHA-256 of the bytes in hexadecimal, or
    `phash:` and 16 digits."""
    known_distance: int = 4
    """Bits by which a picture's perceptual hash may differ from a listed one."""
    size: int = 512
    """Longer pictures are made smaller until their shorter side is this many pixels; smaller ones stay."""
    quality: int = 95
    """JPEG quality of pictures that were made smaller."""
    keep_original: bool = False
    """Store the bytes as they came."""
    min_side: int = 32
    """Pixels of the shorter side; smaller pictures are dropped."""
    max_aspect: float = 4.0
    """Longer side over shorter side; above it pictures are dropped."""

    def __post_init__(self) -> None:
        if not self.contact.strip() or not self.contact.isascii() or not self.contact.isprintable():
            raise UsageError(
                f"contact {self.contact!r} must be a web page or an e-mail address in ASCII; sites that are asked for "
                "pictures have a right to know by whom"
            )
        if not self.product.replace("-", "").replace("_", "").isalpha() or not self.product.isascii():
            raise UsageError(f"product {self.product!r} may have letters, - and _ only (RFC 9309); for example diptych")
        for name in ("concurrency", "per_host", "partitions", "attempts", "dead_after", "size", "max_bytes"):
            self._require(name, 1.0)
        for name in ("deadline", "connect_timeout", "read_timeout"):
            self._require(name, 0.01)
        for name in ("max_redirects", "backoff", "max_wait", "min_side", "known_distance"):
            self._require(name, 0.0)
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality {self.quality} is not in 1..100; use 95")
        if self.max_aspect < 1:
            raise UsageError(f"max_aspect {self.max_aspect} is below 1; a square has 1")
        for port in self.ports:
            if not 0 < port < 65536:
                raise UsageError(f"port {port} is not in 1..65535; web servers answer at 80 and 443")
        for host in self.allow_host:
            name, colon, port = host.rpartition(":")
            if not (name and colon and port.isdigit()):
                raise UsageError(f"allow_host {host!r} is not host:port; for example 127.0.0.1:8000")

    def _require(self, name: str, least: float) -> None:
        value = vars(self)[name]
        if not value >= least:
            raise UsageError(f"{name} {value} must be at least {least:g}; leave it out for the default")
