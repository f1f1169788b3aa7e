"""A small world of web servers on loopback, most of them hostile, and what a fetch must make of each.

In this world 127.0.0.9 plays the public internet: every name under `.test` is there unless it is listed in `NAMES`.
The same port on 127.0.0.1, 127.0.0.2 and ::1 plays what must never be asked: real sockets that count connections.
"""

import asyncio
import contextlib
import gzip
import io
import ipaddress
import socket
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.guard import Guard, IPAddress, is_public
from diptych.curate.fetch.ledger import Ledger, Reader
from diptych.curate.fetch.worker import fetch_partition

PUBLIC = "127.0.0.9"
PRIVATE = ("127.0.0.1", "127.0.0.2", "::1")
MAX_BYTES = 100_000


def picture(colour: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
Answer = Callable[["Call"], Awaitable[None]]


@dataclass
class Call:
    """One request."""

    path: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    world: "World"

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
        await self.send("\r\n".join([*lines, "", ""]).encode(), body)


@dataclass
class World:
    """The servers while they stand."""

    port: int
    forbidden: int = 0
    """Connections to what must never be asked."""
    asked: list[str] = field(default_factory=list)
    """Host and path of every request."""
    agents: set[str] = field(default_factory=set)
    times: list[tuple[str, float]] = field(default_factory=list)
    lookups: dict[str, int] = field(default_factory=dict)
    routes: dict[str, Answer] = field(default_factory=dict)

    async def lookup(self, name: str) -> list[str]:
        nth = self.lookups[name] = self.lookups.get(name, 0) + 1
        found = NAMES.get(name.removesuffix("."), [PUBLIC] if name.endswith(".test") else [])
        if isinstance(found, OSError):
            raise found
        if found and isinstance(found[0], list):
            found = found[min(nth, len(found)) - 1]
        return found

    def guard(self, **options) -> Guard:
        return Guard(lookup=self.lookup, is_public=public_here, **options)


def public_here(address: IPAddress) -> bool:
    return address == ipaddress.ip_address(PUBLIC) or is_public(address)


NAMES: dict[str, list] = {
    "localhost": ["127.0.0.1"],
    "private.test": ["127.0.0.1"],
    "mixed.test": [PUBLIC, "127.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "six.test": ["::1"],
    "rebinds.test": [["127.0.0.1"], [PUBLIC]],
    "rebinds-late.test": [[PUBLIC], ["127.0.0.1"]],
    "nobody.test": [],
    "no-resolver.test": OSError("no answer"),  # type: ignore[dict-item]
}


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Start everything in a thread with an event loop of its own; stop it all at the end."""
    port, sockets = _free_sockets()
    here = World(port, routes=dict(ROUTES))
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        async def forbidden(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            here.forbidden += 1
            writer.close()

        def public(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None]:
            return _handle(reader, writer, here)

        async with contextlib.AsyncExitStack() as stack:
            for address, listener in sockets.items():
                server = await asyncio.start_server(public if address == PUBLIC else forbidden, sock=listener)
                stack.callback(server.close)
            ready.set()
            await stop.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(10)
    try:
        yield here
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _free_sockets() -> tuple[int, dict[str, socket.socket]]:
    while True:
        sockets: dict[str, socket.socket] = {}
        port = 0
        try:
            for address in (PUBLIC, *PRIVATE):
                sockets[address] = socket.create_server(
                    (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
                )
                port = sockets[address].getsockname()[1]
            return port, sockets
        except OSError:  # the port is taken at one of them
            for one in sockets.values():
                one.close()


async def _handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, here: World) -> None:
    try:
        first = await reader.readexactly(1)
        if first == b"\x16":  # a TLS greeting
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            return
        while True:
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            first = b""
            path = head[0].split(" ")[1]
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
            name = headers.get("host", "").partition(":")[0].removesuffix(".test")
            here.asked.append(name + path)
            here.times.append((name, asyncio.get_running_loop().time()))
            here.agents.add(headers.get("user-agent", ""))
            route = here.routes.get(name + path, here.routes.get(name) if path != "/robots.txt" else None)
            call = Call(path, headers, writer, here)
            if route is None and path == "/robots.txt":
                await call.answer(b"", status="404 Not Found")
            else:
                await (route or _picture)(call)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
        pass  # the other side went away, or the world ends
    finally:
        writer.close()


async def _picture(call: Call) -> None:
    await call.answer(PICTURE, "Content-Type: image/png")


def body(data: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> Answer:
    async def answer(call: Call) -> None:
        await call.answer(data, *headers, status=status, length=length)

    return answer


def redirect(target: str, *headers: str, status: str = "302 Found") -> Answer:
    async def answer(call: Call) -> None:
        await call.answer(b"", f"Location: {target.replace('PORT', str(call.world.port))}", *headers, status=status)

    return answer


def raw(*pieces: bytes, then: Callable[[Call], Awaitable[None]] | None = None) -> Answer:
    async def answer(call: Call) -> None:
        await call.send(*pieces)
        if then is not None:
            await then(call)
        raise ConnectionError  # and hang up

    return answer


async def _trickle(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for octet in PICTURE:
        await call.send(bytes([octet]))
        await asyncio.sleep(0.1)


async def _trickle_head(call: Call) -> None:
    for octet in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 1000:
        await call.send(bytes([octet]))
        await asyncio.sleep(0.1)


async def _silence(call: Call) -> None:
    await asyncio.sleep(20)


async def _endless(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", PICTURE)
    while True:
        await call.send(bytes(50_000))


async def _endless_chunks(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await call.send(b"2710\r\n" + bytes(10_000) + b"\r\n")


async def _endless_head(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(1_000_000):
        await call.send(f"X-{number}: {'a' * 1000}\r\n".encode())


async def _endless_robots(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\n\r\nUser-agent: *\nDisallow: /secret\n")
    while True:
        await call.send(b"# nothing\n" * 5000)


async def _reset(call: Call) -> None:
    linger = struct.pack("ii", 1, 0)
    call.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    raise ConnectionError


async def _longer(call: Call) -> None:
    await call.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode(), PICTURE + b"HTTP/1.1 200 OK")


def _bomb(size: int = 50_000_000) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(PICTURE) + packer.compress(bytes(size)) + packer.flush()


ROUTES: dict[str, Answer] = {
    # redirects
    "to-loopback": redirect("http://127.0.0.1:PORT/"),
    "to-decimal": redirect("http://2130706433:PORT/"),
    "to-mapped": redirect("http://[::ffff:7f00:1]:PORT/", status="307 Temporary Redirect"),
    "to-six": redirect("http://[::1]:PORT/", status="308 Permanent Redirect"),
    "to-private-name": redirect("http://private.test:PORT/", status="301 Moved Permanently"),
    "to-mixed-name": redirect("http://mixed.test:PORT/"),
    "to-metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "to-relative-host": redirect("//127.0.0.1:PORT/"),
    "to-file": redirect("file:///etc/passwd"),
    "to-data": redirect("data:image/png;base64,AAAA"),
    "to-port": redirect("http://good.test:22/"),
    "to-user": redirect("http://good.test@127.0.0.1:PORT/"),
    "to-itself": redirect("http://to-itself.test:PORT/"),
    "to-nowhere": raw(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "to-nonsense": redirect("http://[::1"),
    "to-robots": redirect("http://all-forbidden.test:PORT/x.png"),
    "to-good": redirect("http://good.test:PORT/moved.png"),
    "to-good-five": redirect("http://to-good-four.test:PORT/"),
    "to-good-six": redirect("http://to-good-five.test:PORT/"),
    "to-good-four": redirect("http://to-good-three.test:PORT/"),
    "to-good-three": redirect("http://to-good-two.test:PORT/"),
    "to-good-two": redirect("http://to-good.test:PORT/"),
    "to-relative": redirect("/other.png"),
    "to-relative/other.png": _picture,
    # bodies
    "trickle": _trickle,
    "trickle-head": _trickle_head,
    "silence": _silence,
    "half": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PICTURE[:20], then=_silence),
    "endless": _endless,
    "endless-chunks": _endless_chunks,
    "endless-head": _endless_head,
    "announced": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", then=_silence),
    "shorter": raw(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE) + 50}\r\n\r\n".encode(), PICTURE),
    "longer": _longer,
    "two-lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 500\r\n\r\nhello"),
    "bad-length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello"),
    "bad-chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n"),
    "cut-chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    "bomb": body(_bomb(), "Content-Encoding: gzip"),
    "bomb-deflate": body(zlib.compress(bytes(50_000_000), 9), "Content-Encoding: deflate"),
    "bomb-unannounced": raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: x-gzip\r\n\r\n" + _bomb()),
    "gzip": body(gzip.compress(PICTURE), "Content-Encoding: gzip"),
    "gzip-cut": body(gzip.compress(PICTURE)[:-20], "Content-Encoding: gzip"),
    "gzip-broken": body(b"no gzip at all", "Content-Encoding: gzip"),
    "brotli": body(PICTURE, "Content-Encoding: br"),
    "packed-twice": body(gzip.compress(gzip.compress(PICTURE)), "Content-Encoding: gzip, gzip"),
    "not-http": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "hangs-up": raw(),
    "reset": _reset,
    "empty": body(b""),
    "html": body(b"<!doctype html><title>gone</title>", "Content-Type: image/jpeg"),
    "svg": body(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Content-Type: image/svg+xml"),
    "eps": body(b"%!PS-Adobe-3.0 EPSF-3.0\n", "Content-Type: image/jpeg"),
    # statuses
    "not-found": body(b"gone", status="404 Not Found"),
    "no-entry": body(b"no", status="403 Forbidden"),
    "error": body(b"no", status="500 Internal Server Error"),
    "busy": body(b"no", "Retry-After: 3600", status="503 Service Unavailable"),
    "too-many": body(b"no", "Retry-After: 3600", status="429 Too Many Requests"),
    "too-many-date": body(b"no", "Retry-After: Fri, 31 Dec 2049 23:59:59 GMT", status="429 Too Many Requests"),
    "nothing": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "part": body(PICTURE, "Content-Range: bytes 0-9/10", status="206 Partial Content"),
    # robots.txt
    "all-forbidden/robots.txt": body(b"User-agent: *\nDisallow: /\n"),
    "we-forbidden/robots.txt": body(b"User-agent: Diptych\nDisallow: /\n\nUser-agent: *\nAllow: /\n"),
    "others-forbidden/robots.txt": body(b"User-agent: otherbot\nDisallow: /\n"),
    "robots-error/robots.txt": body(b"", status="500 Internal Server Error"),
    "robots-busy/robots.txt": body(b"", status="429 Too Many Requests"),
    "robots-silent/robots.txt": _silence,
    "robots-hangs-up/robots.txt": raw(),
    "robots-refused/robots.txt": body(b"Disallow", status="403 Forbidden"),
    "robots-to-loopback/robots.txt": redirect("http://127.0.0.1:PORT/robots.txt"),
    "robots-moved/robots.txt": redirect("http://all-forbidden.test:PORT/robots.txt"),
    "robots-loop/robots.txt": redirect("http://robots-loop.test:PORT/robots.txt"),
    "robots-endless/robots.txt": _endless_robots,
    "robots-html/robots.txt": body(b"<html>User-agent: *<br>Disallow: /</html>"),
    "robots-bomb/robots.txt": body(
        gzip.compress(b"User-agent: *\nDisallow: /\n" + b"#" * 50_000_000), "Content-Encoding: gzip"
    ),
    # opt-outs
    "noai": body(PICTURE, "X-Robots-Tag: noai"),
    "noimageai": body(PICTURE, "X-Robots-Tag: NoArchive, NoImageAI"),
    "noml": body(PICTURE, "X-Robots-Tag: noarchive", "X-Robots-Tag: noml"),
    "none": body(PICTURE, "x-robots-tag: none"),
    "noindex-us": body(PICTURE, "X-Robots-Tag: otherbot: nofollow, diptych: noindex"),
    "noindex-others": body(PICTURE, "X-Robots-Tag: otherbot: noindex, noai"),
    "preview": body(PICTURE, "X-Robots-Tag: max-snippet: 20, max-image-preview: large"),
    "expired": body(PICTURE, "X-Robots-Tag: unavailable_after: Sunday, 25-Jun-2023 15:00:00 GMT"),
    "tdm": body(PICTURE, "TDM-Reservation: 1"),
    "usage": body(PICTURE, "Content-Usage: search=y, train-ai=n"),
    "noai-redirect": redirect("http://good.test:PORT/", "X-Robots-Tag: noai"),
}

_ROUTE_CASES = {
    **dict.fromkeys(
        ["to-loopback", "to-decimal", "to-mapped", "to-six", "to-private-name", "to-mixed-name", "to-relative-host"],
        "address",
    ),
    "to-metadata": "address",
    "to-file": "scheme",
    "to-data": "scheme",
    "to-port": "port",
    "to-user": "userinfo",
    "to-itself": "redirects",
    "to-nowhere": "redirects",
    "to-nonsense": "redirects",
    "to-robots": "robots",
    "to-good": "ok",
    "to-good-five": "ok",
    "to-good-six": "redirects",
    "to-relative": "ok",
    "trickle": "timeout",
    "trickle-head": "timeout",
    "silence": "timeout",
    "half": "timeout",
    "endless": "too_large",
    "endless-chunks": "too_large",
    "endless-head": "protocol",
    "announced": "too_large",
    "shorter": "cut_off",
    "longer": "ok",
    "two-lengths": "protocol",
    "bad-length": "protocol",
    "bad-chunk": "protocol",
    "cut-chunk": "cut_off",
    "bomb": "too_large",
    "bomb-deflate": "too_large",
    "bomb-unannounced": "too_large",
    "gzip": "ok",
    "gzip-cut": "cut_off",
    "gzip-broken": "encoding",
    "brotli": "encoding",
    "packed-twice": "encoding",
    "not-http": "protocol",
    "hangs-up": "connect",
    "reset": "connect",
    "empty": "empty",
    "html": "not_a_picture",
    "svg": "not_a_picture",
    "eps": "not_a_picture",
    "not-found": "http_404",
    "no-entry": "http_403",
    "error": "http_500",
    "busy": "http_503",
    "too-many": "http_429",
    "too-many-date": "http_429",
    "nothing": "http_204",
    "part": "http_206",
    "all-forbidden": "robots",
    "we-forbidden": "robots",
    "others-forbidden": "ok",
    "robots-error": "robots_unreachable",
    "robots-busy": "robots_unreachable",
    "robots-silent": "robots_unreachable",
    "robots-hangs-up": "connect",
    "robots-refused": "ok",
    "robots-to-loopback": "robots_unreachable",
    "robots-moved": "robots",
    "robots-loop": "ok",
    "robots-endless": "ok",
    "robots-html": "ok",
    "robots-bomb": "robots",
    "noai": "opt_out",
    "noimageai": "opt_out",
    "noml": "opt_out",
    "none": "opt_out",
    "noindex-us": "opt_out",
    "noindex-others": "ok",
    "preview": "ok",
    "expired": "opt_out",
    "tdm": "opt_out",
    "usage": "opt_out",
    "noai-redirect": "opt_out",
    "private": "address",
    "mixed": "address",
    "mapped": "address",
    "nat64": "address",
    "six": "address",
    "rebinds": "address",
    "rebinds-late": "ok",
    "nobody": "dns",
    "no-resolver": "dns",
    "good": "ok",
}
"""Name under .test -> outcome."""

_ADDRESSES = {
    "loopback": "127.0.0.1",
    "another loopback": "127.0.0.2",
    "the public one, but by number": "127.0.0.9",
    "one dot": "127.1",
    "two dots": "127.0.1",
    "decimal": "2130706433",
    "hexadecimal": "0x7f000001",
    "hexadecimal parts": "0x7f.0x0.0x0.0x1",
    "octal": "017700000001",
    "octal part": "0177.0.0.1",
    "padded": "127.000.000.001",
    "overflowing": "4294967297",
    "zero": "0",
    "unspecified": "0.0.0.0",
    "trailing dot": "127.0.0.1.",
    "full-width digits": "１２７.０.０.１",
    "ideographic dots": "127。0。0。1",
    "circled digits": "①②⑦.0.0.1",
    "percent-encoded": "%31%32%37.0.0.1",
    "private 10": "10.0.0.1",
    "private 172": "172.16.0.1",
    "private 192": "192.168.0.1",
    "shared": "100.64.0.1",
    "cloud metadata": "169.254.169.254",
    "benchmarking": "198.18.0.1",
    "multicast": "224.0.0.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "6 loopback": "[::1]",
    "6 unspecified": "[::]",
    "6 mapped": "[::ffff:127.0.0.1]",
    "6 mapped in hexadecimal": "[::ffff:7f00:1]",
    "6 compatible": "[::127.0.0.1]",
    "6 NAT64": "[64:ff9b::127.0.0.1]",
    "6 NAT64 of this network": "[64:ff9b:1::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "6 Teredo": "[2001:0:7f00:1::]",
    "6 link": "[fe80::1]",
    "6 link with a zone": "[fe80::1%25lo]",
    "6 site": "[fec0::1]",
    "6 unique local": "[fd00:ec2::254]",
    "6 multicast": "[ff02::1]",
    "6 documentation": "[2001:db8::1]",
    "localhost": "localhost",
}

_URLS = {
    "file": ("file:///etc/passwd", "scheme"),
    "file at a host": ("file://127.0.0.1/etc/passwd", "scheme"),
    "ftp": ("ftp://good.test/x.png", "scheme"),
    "gopher": ("gopher://127.0.0.1:PORT/_GET", "scheme"),
    "data": ("data:image/png;base64,AAAA", "scheme"),
    "javascript": ("javascript:alert(1)", "scheme"),
    "no scheme": ("//good.test/x.png", "scheme"),
    "a path": ("/etc/passwd", "scheme"),
    "password": ("http://user:secret@good.test:PORT/", "userinfo"),
    "name as a user": ("http://good.test:PORT@127.0.0.1:PORT/", "userinfo"),
    "port of ssh": ("http://good.test:22/", "port"),
    "no such port": ("http://good.test:99999/", "url"),
    "no host": ("http:///x.png", "url"),
    "backslash": ("http://good.test:PORT\\@127.0.0.1:PORT/", "url"),
    "line break": ("http://good.test:PORT/\r\nHost: 127.0.0.1\r\n\r\n", "url"),
    "NUL": ("http://127.0.0.1%00.good.test:PORT/", "url"),
    "too long": ("http://good.test:PORT/" + "a" * 5000, "url"),
    "open bracket": ("http://[::1/", "url"),
    "TLS with who speaks none": ("https://no-tls.test:PORT/", "tls"),
}


def cases(port: int) -> dict[str, tuple[str, str]]:
    """Name -> (URL, outcome)."""
    found = {f"host {name}": (f"http://{host}:{port}/x.png", "address") for name, host in _ADDRESSES.items()}
    found |= {f"url {name}": (url.replace("PORT", str(port)), expected) for name, (url, expected) in _URLS.items()}
    found |= {f"server {name}": (f"http://{name}.test:{port}/x.png", end) for name, end in _ROUTE_CASES.items()}
    for name in ("to-relative",):
        found[f"server {name}"] = (f"http://{name}.test:{port}/", found[f"server {name}"][1])
    return found


def fetch_all(folder: Path, urls: list[str], world: World, **changes) -> dict[str, str | None]:
    """Fetch addresses of this world as one partition; address -> outcome."""
    settings = {"ports": (80, 443, world.port), "deadline": 2.0, "read_timeout": 1.0, "attempts": 1}
    settings |= {"contact": "https://example.org/crawler", "max_bytes": MAX_BYTES}
    config = FetchConfig(folder=folder, out=folder, **(settings | changes))
    with Ledger(folder / "ledger" / "0000") as ledger:
        ledger.add(urls)
    fetch_partition(config, 0, guard=world.guard())
    with Reader(folder / "ledger", 1) as reader:
        found = {url: reader.find(url) for url in urls}
    return {url: entry.outcome if entry else None for url, entry in found.items()}
