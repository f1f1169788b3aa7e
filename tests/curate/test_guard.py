import asyncio
import contextlib
import ipaddress
import random
import socket

import hostile_web
import pytest

from diptych.curate.fetch.guard import Guard, check_url, is_public, parse_allowed
from diptych.curate.fetch.outcomes import NotFetched

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.255", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
    *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1"),
    *("2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
    *("168.63.129.16", "::ffff:168.63.129.16", "2606:4700::5efe:a00:1", "2606:4700::200:5efe:808:808"),
    *("fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "4000::1", "1::1"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_public(text):
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_all_others_are_not(text):
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("http://example.com/a b.jpg?q=1#top", "example.com", "/a%20b.jpg?q=1"),
        ("  HTTPS://EXAMPLE.com/x ", "example.com", "/x"),
        ("http://bücher.example/ü", "xn--bcher-kva.example", "/%C3%BC"),
        ("http://8.8.8.8/x", "8.8.8.8", "/x"),
        ("http://[2606:4700:4700::1111]/x", "2606:4700:4700::1111", "/x"),
        ("http://under_score.example/x", "under_score.example", "/x"),
    ],
)
def test_addresses_that_may_be_asked_are_read(text, host, path):
    url = check_url(text, ports=(80, 443))
    assert (url.raw_host, url.raw_path_qs) == (host, path)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("http://example.com/\ud800x", "half a character"),
        ("http://example.com:8_0/x", "no number of plain digits"),
        ("http://example.com:\u0668\u0660/x", "no number of plain digits"),
        ("http://[v1.x]/x", "brackets around what is no IPv6 address"),
        ("http://[\u202e]@", ""),  # an IndexError of the parser
    ],
)
def test_what_parsers_read_differently_is_refused(text, detail):
    with pytest.raises(NotFetched) as caught:
        check_url(text, ports=(80, 443))
    assert caught.value.reason == "url"
    assert detail in caught.value.detail


def test_random_addresses_are_read_or_refused():
    pieces = [
        *"[]:@%?#/.-_x1",
        "::1",
        "xn--",
        "%25",
        "\u3002",
        "\uff11",
        "\ud800",
        "\u202e",
        "8.8.8.8",
        "0x7f",
        "\u0660",
    ]
    draw = random.Random(0)
    for _ in range(5000):
        text = "http://" + "".join(draw.choices(pieces, k=draw.randrange(1, 7)))
        with contextlib.suppress(NotFetched):
            url = check_url(text, ports=(80,))
            assert url.port == 80
            assert str(url).encode()


def test_an_allowed_host_is_allowed_at_its_port_only():
    allowed = parse_allowed(["127.0.0.1:8000", "[::1]:9000", "Here.test:7000"])
    assert allowed == {("127.0.0.1", 8000), ("::1", 9000), ("here.test", 7000)}
    assert check_url("http://127.0.0.1:8000/x", ports=(80,), allowed=allowed)
    assert check_url("http://[::1]:9000/x", ports=(80,), allowed=allowed)
    for text, reason in (("http://127.0.0.1/x", "address"), ("http://127.0.0.1:8001/x", "port")):
        with pytest.raises(NotFetched, match=reason):
            check_url(text, ports=(80,), allowed=allowed)


def names(**found: list[str]):
    async def lookup(name: str) -> list[str]:
        return found.get(name, [])

    return lookup


def test_what_is_resolved_is_what_may_be_dialled():
    async def go():
        guard = Guard(lookup=names(good=["8.8.8.8", "2606:4700:4700::1111"], mixed=["8.8.8.8", "10.0.0.1"]))
        assert [one["host"] for one in await guard.resolve("good", 80)] == ["8.8.8.8", "2606:4700:4700::1111"]
        for name, reason in (("mixed", "address"), ("none", "dns")):
            with pytest.raises(NotFetched) as caught:
                await guard.resolve(name, 80)
            assert caught.value.reason == reason

    asyncio.run(go())


@pytest.mark.parametrize("text", ["", "x", "8.8", "8.8.8.8%lo", "008.8.8.8", "8.8.8.8\n"])
def test_an_answer_that_is_no_address_is_a_name_not_found(text):
    with pytest.raises(NotFetched, match="no address") as caught:
        asyncio.run(Guard(lookup=names(odd=["8.8.8.8", text])).resolve("odd", 80))
    assert caught.value.reason == "dns"


def test_of_thousands_of_addresses_all_are_judged_and_a_few_are_dialled():
    many = [f"8.8.{i // 250}.{i % 250}" for i in range(5000)]
    guard = Guard(lookup=names(many=many, bad=[*many, "10.0.0.1"]))
    assert [one["host"] for one in asyncio.run(guard.resolve("many", 80))] == many[:16]
    with pytest.raises(NotFetched, match="address"):
        asyncio.run(guard.resolve("bad", 80))


def test_a_name_that_moves_is_refused_when_it_is_looked_up_again():
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])

    async def lookup(name: str) -> list[str]:
        return next(answers)

    async def go():
        guard = Guard(lookup=lookup)
        assert await guard.resolve("moves.test", 80)
        with pytest.raises(NotFetched, match="address"):
            await guard.resolve("moves.test", 80)

    asyncio.run(go())


def test_an_allowed_name_opens_loopback_only_and_at_its_port_only():
    async def go():
        guard = Guard(allowed={("here.test", 8000)}, lookup=lambda name: _same(name))
        assert await guard.resolve("here.test", 8000)
        guard.open_socket(_destination("127.0.0.1", 8000)).close()
        for host, port in (("127.0.0.1", 8001), ("127.0.0.2", 8000), ("10.0.0.1", 8000), ("::1", 8000)):
            with pytest.raises(PermissionError, match="not public"):
                guard.open_socket(_destination(host, port))
        for name, port in (("here.test", 8001), ("there.test", 8000)):
            with pytest.raises(NotFetched, match="address"):
                await guard.resolve(name, port)

    async def _same(name: str) -> list[str]:
        return ["127.0.0.1"]

    asyncio.run(go())


def test_an_allowed_name_may_not_lead_into_the_network():
    async def go():
        guard = Guard(allowed={("here.test", 8000)}, lookup=names(**{"here.test": ["10.0.0.1"]}))
        with pytest.raises(NotFetched, match="address"):
            await guard.resolve("here.test", 8000)

    asyncio.run(go())


def _destination(host: str, port: int):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return family, socket.SOCK_STREAM, 6, "", (host, port) if family == socket.AF_INET else (host, port, 0, 0)


def test_the_socket_alone_stops_what_the_other_two_let_through(tmp_path):
    """The resolver says that everything is public: only the last check is left, and it is enough."""
    from diptych.curate.fetch.client import Visitor
    from diptych.curate.fetch.config import FetchConfig
    from diptych.curate.fetch.ledger import Ledger

    class Careless(Guard):
        async def resolve(self, host, port=0, family=socket.AF_UNSPEC):
            self._is_public, strict = (lambda address: True), self._is_public
            try:
                return await super().resolve(host, port, family)
            finally:
                self._is_public = strict

    async def go(world):
        config = FetchConfig(folder=tmp_path, out=tmp_path, contact="me@example.org", ports=(world.port,), robots=False)
        guard = Careless(lookup=world.lookup, is_public=hostile_web.public_here)
        with Ledger(tmp_path / "0000") as ledger:
            async with Visitor(config, guard, ledger) as visitor:
                with pytest.raises(NotFetched, match="connect"):
                    await visitor.fetch(f"http://private.test:{world.port}/x")
                assert await visitor.fetch(f"http://good.test:{world.port}/x")

    with hostile_web.world() as world:
        asyncio.run(go(world))
        assert world.forbidden == 0


def test_without_the_guard_what_is_forbidden_would_be_asked(tmp_path):
    """The listeners of the hostile world do count: 0 of them means something."""
    from diptych.curate.fetch.config import FetchConfig
    from diptych.curate.fetch.ledger import Ledger
    from diptych.curate.fetch.worker import fetch_partition

    with hostile_web.world() as world:
        config = FetchConfig(
            folder=tmp_path, out=tmp_path, contact="me@example.org", ports=(world.port,), attempts=1, deadline=2.0
        )
        with Ledger(tmp_path / "ledger" / "0000") as ledger:
            ledger.add(f"http://{name}.test:{world.port}/x" for name in ("private", "mapped", "to-private-name"))
        fetch_partition(config, 0, guard=Guard(lookup=world.lookup, is_public=lambda address: True))
        assert world.forbidden >= 3
