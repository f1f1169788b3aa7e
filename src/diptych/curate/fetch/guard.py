"""Which addresses may be asked: the guard against being sent to machines that are not on the public web.

A list of picture addresses is written by strangers. Without a guard, http://169.254.169.254/ reads the secrets of a
cloud machine, and a redirect, a number written in octal or a name that resolves differently the second time leads
there by a detour. Three checks, each of which alone stops it:

1. `check_url` reads the address once, with the parser whose result is then asked (yarl), and refuses what browsers
   and resolvers read differently.
2. `Guard.resolve` is the resolver of the connection: every address of a name must be public, and what it returns is
   what is dialled; nothing is looked up twice.
3. `Guard.open_socket` makes the sockets: it refuses any destination that the first two should not have let through.

Redirects are followed by hand, through all three.
"""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from diptych.curate.fetch.outcomes import NotFetched

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str], Awaitable[list[str]]]
"""Name -> its addresses; raises OSError if there is none."""

MAX_URL = 4096
"""Characters of an address that is asked."""
_MAX_DIALLED = 16
"""Addresses of one name that are tried; all of them are judged."""

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        # IANA's registries of special-purpose addresses; here, because what Python calls global depends on its version
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
        "168.63.129.16/32",  # public by number, but on every machine of Azure's it is the host that keeps its secrets
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23", "2001:db8::/32", "2002::/16"),
        *("2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)")
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


def is_public(address: IPAddress) -> bool:
    """Whether an address is one of the public internet.

    An IPv6 address that stands for an IPv4 one (mapped, NAT64) is judged as that. 6to4, Teredo and ISATAP are refused:
    nothing that serves pictures uses them today. 6over4 cannot be: it looks like any address that ends in a number.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[12:])
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST or address.packed[8:12] in _ISATAP:
            return False
    return address.is_global and not any(address.version == net.version and address in net for net in _NOT_PUBLIC)


def check_url(text: str, *, ports: Iterable[int], allowed: Iterable[tuple[str, int]] = ()) -> yarl.URL:
    """Read an address that may be asked, without its fragment; raises NotFetched. Looks up no name."""
    url = _read(text)
    if url.scheme not in ("http", "https"):
        raise NotFetched("scheme", url.scheme or "none")
    host, port = url.raw_host, url.port
    if not host or port is None:
        raise NotFetched("url", "no host")
    if url.raw_user is not None or url.raw_password is not None:
        raise NotFetched("userinfo", "a name or password in the address")
    if (host, port) in allowed:
        return url
    if port not in ports:
        raise NotFetched("port", str(port))
    address = _literal(host)
    if address is not None and not is_public(address):
        raise NotFetched("address", host)
    return url


def _read(text: str) -> yarl.URL:
    if len(text) > MAX_URL:
        raise NotFetched("url", f"{len(text)} characters")
    head, slash, path = text.strip(" ").partition("://")
    host, cut, path = path.partition("/")
    text = head + slash + host + cut + path.replace(" ", "%20")  # as browsers do; common in pages
    if any(ord(char) <= 32 or ord(char) == 127 or char == "\\" or "\ud800" <= char <= "\udfff" for char in text):
        raise NotFetched(
            "url", "a space, a control character, a backslash or half a character, which are read in different ways"
        )
    authority = re.split("[?#]", host, maxsplit=1)[0].rpartition("@")[2]
    _, colon, port = authority.rpartition("]")[2].rpartition(":")
    if colon and re.search("[^0-9]", port):
        raise NotFetched("url", "a port that is no number of plain digits")
    try:
        url = yarl.URL(text).with_fragment(None)
        _ = url.port, url.raw_host
    except (ValueError, TypeError, IndexError) as error:  # yarl has raised all of them
        raise NotFetched("url", str(error)) from None
    if "[" in authority and ":" not in (url.raw_host or ""):
        raise NotFetched("url", "brackets around what is no IPv6 address")
    return url


def _literal(host: str) -> IPAddress | None:
    """The address, if the host is one; raises NotFetched for a number that only some read as an address."""
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host)
        except ValueError:
            raise NotFetched("url", f"{host} is no address") from None
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):  # what browsers take as IPv4: decimal, octal and hexadecimal, 1 to 4 parts
        try:
            return ipaddress.IPv4Address(host)
        except ValueError:
            raise NotFetched("address", f"{host} is a number, but not written as an address") from None
    if len(host) > 253 or not all(_HOST.fullmatch(label) for label in labels):
        raise NotFetched("url", f"{host!r} is no host name")
    return None


class Guard(AbstractResolver):
    """Resolves names for a connector and opens its sockets, so that nothing else is ever dialled."""

    def __init__(
        self,
        *,
        allowed: Iterable[tuple[str, int]] = (),
        lookup: Lookup | None = None,
        is_public: Callable[[IPAddress], bool] = is_public,
    ) -> None:
        self.allowed = frozenset(allowed)
        self._lookup = lookup or self._ask
        self._resolver: aiohttp.AsyncResolver | None = None
        self._is_public = is_public
        self._local = {(host, port) for host, port in self.allowed if _is_loopback(host)}

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002  the interface's
    ) -> list[ResolveResult]:
        """All addresses of a name, if all of them may be asked; raises NotFetched."""
        try:
            texts = await self._lookup(host)
        except (OSError, UnicodeError) as error:
            raise NotFetched("dns", str(error)) from None
        if not texts:
            raise NotFetched("dns", f"{host} has no address")
        for text in texts:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                raise NotFetched("dns", f"{host} is at {text!r}, which is no address") from None
            if self._is_public(address):
                continue
            if (host, port) not in self.allowed or not _is_loopback(text):
                raise NotFetched("address", f"{host} is at {text}")  # one bad address condemns the name
            self._local.add((text, port))
        return [
            ResolveResult(
                hostname=host,
                host=text,
                port=port,
                family=socket.AF_INET6 if ":" in text else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for text in texts[:_MAX_DIALLED]
        ]

    def open_socket(self, info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        """A socket for one destination; raises OSError for one that nobody should have asked for."""
        family, kind, protocol, _, destination = info
        host, port = destination[0], destination[1]
        if not self._is_public(ipaddress.ip_address(host)) and (host, port) not in self._local:
            raise PermissionError(f"{host}:{port} is not public")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Let go of the resolver."""
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None

    async def _ask(self, name: str) -> list[str]:
        """Ask the machine's name servers, without blocking (c-ares)."""
        if self._resolver is None:
            self._resolver = aiohttp.AsyncResolver()
        return [found["host"] for found in await self._resolver.resolve(name, family=socket.AF_UNSPEC)]


def parse_allowed(hosts: Iterable[str]) -> frozenset[tuple[str, int]]:
    """`host:port`, `[::1]:8000` -> pairs as a URL gives them."""
    pairs = (host.rpartition(":") for host in hosts)
    return frozenset((name.strip("[]").lower(), int(port)) for name, _, port in pairs)


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
