"""Asks the web for one picture at a time: politely, within limits, and only at addresses that are public.

Redirects are followed by hand. At every hop the address is checked, the host's robots.txt is asked, and the answer's
headers are read for an opt-out. The body is counted while it arrives, packed and unpacked. The whole has a deadline.
"""

import asyncio
import importlib.metadata
import time
import urllib.parse
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType

import aiohttp
import yarl

from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.guard import Guard, check_url
from diptych.curate.fetch.ledger import Ledger
from diptych.curate.fetch.outcomes import NotFetched
from diptych.curate.fetch.robots import ALLOW_ALL, MAX_ROBOTS_BYTES, Rules, opts_out, parse_robots

ROBOTS_SECONDS = 24 * 3600.0
"""A robots.txt is asked again after this time (RFC 9309, 2.4)."""
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST_REASONS = ("dns", "connect", "tls", "address", "port")
_DNS_SECONDS = 60
_HOSTS = 20_000


@dataclass(frozen=True)
class FetchedImage:
    """Bytes as they came."""

    data: bytes
    url: str
    """Where they were in the end."""


@dataclass
class _Known:
    task: asyncio.Task[Rules]
    until: float


class Visitor:
    """One client with its connections, names and robots.txt files; an async context."""

    def __init__(self, config: FetchConfig, guard: Guard, memory: Ledger) -> None:
        self._config = config
        self._guard = guard
        self._memory = memory
        self._rules: dict[str, _Known] = {}
        self.user_agent = f"{config.product}{_version()} (+{config.contact})"
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "Visitor":
        config = self._config
        connector = aiohttp.TCPConnector(
            resolver=self._guard,
            socket_factory=self._guard.open_socket,
            ttl_dns_cache=_DNS_SECONDS,
            limit=0,
            keepalive_timeout=10,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": self.user_agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(sock_connect=config.connect_timeout, sock_read=config.read_timeout),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for known in self._rules.values():
            known.task.cancel()
        await asyncio.gather(*(known.task for known in self._rules.values()), return_exceptions=True)
        await self._session.close()
        await self._guard.close()

    async def fetch(self, text: str) -> FetchedImage:
        """Get a picture; raises NotFetched."""
        try:
            async with asyncio.timeout(self._config.deadline):
                return await self._follow(text)
        except TimeoutError:
            raise NotFetched("timeout", f"not whole after {self._config.deadline:g} s") from None

    def crawl_delay(self, text: str) -> float:
        """Seconds that a host wants between two requests, as far as its robots.txt is known."""
        try:
            known = self._rules.get(str(self._check(text).origin()))
        except NotFetched:
            return 0.0
        if known is None or not known.task.done() or known.task.cancelled() or known.task.exception():
            return 0.0
        return known.task.result().crawl_delay

    async def _follow(self, text: str) -> FetchedImage:
        for _ in range(self._config.max_redirects + 1):
            url = self._check(text)
            if self._config.robots:
                rules = await self._rules_of(url)
                if not rules.allows(url.raw_path_qs):
                    raise NotFetched("robots", str(url))
            async with (
                _Translated(),
                self._session.get(url, headers={"Accept": "image/*"}, allow_redirects=False) as response,
            ):
                statement = opts_out(_headers(response), self._config.product, self._config.opt_outs)
                if statement is not None:
                    response.close()
                    raise NotFetched("opt_out", statement)
                if response.status in _REDIRECTS:
                    text = _target(response, url)
                    response.close()
                    continue
                return FetchedImage(await self._read(response), str(url))
        raise NotFetched("redirects", f"more than {self._config.max_redirects}")

    def _check(self, text: str) -> yarl.URL:
        return check_url(text, ports=self._config.ports, allowed=self._guard.allowed)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            wait = _retry_after(response)
            response.close()
            raise NotFetched(f"http_{response.status}", response.reason or "", wait=wait)
        announced = response.content_length
        if announced is not None and announced > self._config.max_bytes:
            response.close()
            raise NotFetched("too_large", f"{announced} bytes announced")
        body = bytearray()
        async for chunk in _unpacked(response, self._config.max_bytes):
            body += chunk
            if len(body) > self._config.max_bytes:
                response.close()
                raise NotFetched("too_large", f"more than {self._config.max_bytes} bytes")
        if not body:
            raise NotFetched("empty", "0 bytes")
        return bytes(body)

    async def _rules_of(self, url: yarl.URL) -> Rules:
        """The rules of a host; asked once, however many pictures wait for them."""
        origin = str(url.origin())
        known = self._rules.get(origin)
        if known is None or (known.task.done() and known.until <= time.monotonic()):
            known = _Known(asyncio.create_task(self._ask_rules(origin)), time.monotonic() + ROBOTS_SECONDS)
            self._rules[origin] = known
            if len(self._rules) > _HOSTS:  # the ledger has them
                self._rules = {name: one for name, one in self._rules.items() if not one.task.done()}
        try:
            return await asyncio.shield(known.task)
        except NotFetched:
            if known.until > time.monotonic() + self._config.backoff:
                known.until = time.monotonic() + self._config.backoff  # a failure is asked again soon
            raise

    async def _ask_rules(self, origin: str) -> Rules:
        text = self._memory.robots(origin, ROBOTS_SECONDS)
        if text is None:
            text = await self._read_robots(origin)
            self._memory.keep_robots(origin, text)
        return parse_robots(text, self._config.product) if text else ALLOW_ALL

    async def _read_robots(self, origin: str) -> str:
        """RFC 9309, 2.3.1: 4xx and too many redirects mean no rules; 5xx, 429 and silence forbid everything."""
        place, seconds = f"{origin}/robots.txt", self._config.deadline / 2
        try:
            async with asyncio.timeout(seconds):
                for hop in range(6):
                    try:
                        url = self._check(place)
                        async with _Translated(), self._session.get(url, allow_redirects=False) as response:
                            if response.status in _REDIRECTS:
                                place = _target(response, url)
                                response.close()
                                continue
                            return await _read_rules(response)
                    except NotFetched as error:
                        if hop == 0 and error.reason in _HOST_REASONS:
                            raise
                        raise NotFetched("robots_unreachable", f"{place}: {error}", wait=error.wait) from None
        except TimeoutError:
            raise NotFetched("robots_unreachable", f"{place}: no answer in {seconds:g} s") from None
        return ""


class _Translated:
    """What the client raises, as a NotFetched."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = _reason_of(error)
        if reason is not None:
            raise NotFetched(reason, f"{type(error).__name__}: {error}") from None


def _reason_of(error: BaseException | None) -> str | None:
    match error:
        case aiohttp.ConnectionTimeoutError() | aiohttp.SocketTimeoutError():
            return "timeout"
        case aiohttp.ClientSSLError() | aiohttp.ServerFingerprintMismatch():
            return "tls"
        case aiohttp.ClientPayloadError():
            return "cut_off"
        case aiohttp.InvalidURL():
            return "url"
        case aiohttp.ClientConnectorDNSError():
            return "dns"
        case aiohttp.ClientResponseError():
            return "protocol"
        case TimeoutError() | None:
            return None  # the deadline's
        case aiohttp.ClientError() | OSError():
            return "connect"
        case ValueError() | LookupError() | EOFError():
            return "protocol"  # a parser stumbled over what the server sent
    return None


async def _read_rules(response: aiohttp.ClientResponse) -> str:
    status = response.status
    if status == 429 or status >= 500 or status < 200:
        wait = _retry_after(response)
        response.close()
        raise NotFetched("robots_unreachable", f"http_{status}", wait=wait)
    if status >= 300:
        response.close()
        return ""
    body = bytearray()
    async for chunk in _unpacked(response, MAX_ROBOTS_BYTES):
        body += chunk
        if len(body) >= MAX_ROBOTS_BYTES:
            response.close()
            break
    return bytes(body[:MAX_ROBOTS_BYTES]).decode("utf-8", "replace").replace("\0", "")


async def _unpacked(response: aiohttp.ClientResponse, limit: int) -> AsyncIterator[bytes]:
    """The body, piece by piece; of a packed one, never more than `limit` bytes and one at a time."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity", "none"):
        async for chunk in response.content.iter_any():
            yield chunk
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        response.close()
        raise NotFetched("encoding", encoding)
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, as its head says
    packed = unpacked = 0
    async for chunk in response.content.iter_any():
        packed += len(chunk)
        if packed > limit:
            response.close()
            raise NotFetched("too_large", f"more than {limit} bytes, packed")
        try:
            piece = unpacker.decompress(chunk, max_length=limit + 1 - unpacked)
        except zlib.error as error:
            response.close()
            raise NotFetched("encoding", str(error)) from None
        unpacked += len(piece)
        yield piece
    if not unpacker.eof and unpacked <= limit:
        raise NotFetched("cut_off", "the packed body breaks off")


def _version() -> str:
    try:
        return "/" + importlib.metadata.version("diptych")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return ""


def _headers(response: aiohttp.ClientResponse) -> list[tuple[str, str]]:
    return list(response.headers.items())


def _target(response: aiohttp.ClientResponse, url: yarl.URL) -> str:
    location = response.headers.get("Location", "")
    if not location:
        raise NotFetched("redirects", f"{response.status} to nowhere")
    try:
        return urllib.parse.urljoin(str(url), location)
    except ValueError as error:
        raise NotFetched("redirects", str(error)) from None


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds, from a number or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal() and text.isascii():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(
        0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    )
