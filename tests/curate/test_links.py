"""Addresses: as the standards say, and the fast ways beside the slow ones."""

import random

import pytest

from diptych.curate.pages.links import URL_INVALID, URL_TOO_LONG, Base, largest_candidate, resolve, split_srcset
from reference.links import split_srcset as split_slowly

# addresses of the URL standard's published tests, against the base http://example.org/foo/bar; None: no address
STANDARD = {
    "http://example\t.\norg": "http://example.org/",
    "http:foo.com": "http://example.org/foo/foo.com",
    "\t   :foo.com   \n": "http://example.org/foo/:foo.com",
    " foo.com  ": "http://example.org/foo/foo.com",
    "http://f:21/ b ? d # e ": "http://f:21/%20b%20?%20d%20",
    "http://f:/c": "http://f/c",
    "http://f:0/c": "http://f:0/c",
    "http://f:00000000000000000000080/c": "http://f/c",
    "http://f:b/c": None,
    "http://f: /c": None,
    "http://f:\n/c": "http://f/c",
    "http://f:65536/c": None,
    "": "http://example.org/foo/bar",
    ":#": "http://example.org/foo/:",
    "/": "http://example.org/",
    "\\x": "http://example.org/x",
    "\\\\x\\hello": "http://x/hello",
    "::23": "http://example.org/foo/::23",
    "http://": None,
    "?foo": "http://example.org/foo/bar?foo",
    "//foo/bar": "http://foo/bar",
    "http:/example.com/": "http://example.org/example.com/",
    "https:example.com/": "https://example.com/",
    "http:\\\\x:b": None,
    "http://[1::2]:3:4": None,
    "http://2001::1": None,
    "http://[::127.0.0.1]": "http://[::7f00:1]/",
    "http://foo:@c:29/d": "http://foo@c:29/d",
    "http://example.com/foo/%2e": "http://example.com/foo/",
    "http://example.com/foo/%2e%2": "http://example.com/foo/%2e%2",
    "http://example.com/foo/../../..bar": "http://example.com/..bar",
    "http://example.com/foo\t%91": "http://example.com/foo%91",
    "http://example.com//foo": "http://example.com//foo",
    "http://www.foo。bar.com": "http://www.foo.bar.com/",
    "http://ＧＯ.com": "http://go.com/",
    "http://你好你好": "http://xn--6qqa088eba/",
    "http://GOO\u200b\u2060\ufeffgoo.com": "http://googoo.com/",
    "http://192.168.257": "http://192.168.1.1/",
    "http://0x7f.1": "http://127.0.0.1/",
    "http://256.256.256.256": None,
    "http://a b": None,
    "data:text/html,test": None,
    "javascript:alert(1)": None,
    "JaVa\tscript:x": None,
    "file:///etc/passwd": None,
    "mailto:x@y": None,
}


def test_addresses_follow_the_standard():
    found = {address: resolve("http://example.org/foo/bar", address) for address in STANDARD}
    assert {address: url or None for address, (url, _) in found.items()} == STANDARD
    assert all((reason is None) == bool(url) for url, reason in found.values())
    assert resolve("", "a.jpg") == ("", URL_INVALID)
    assert resolve("http://a.example/", "x" * 5000)[1] == URL_TOO_LONG


@pytest.mark.parametrize(
    ("srcset", "address"),
    [
        ("a.jpg 1x, b.jpg 2x", "b.jpg"),
        ("a,b.jpg 300w,c.jpg 200w", "a,b.jpg"),
        ("a.jpg, b.jpg 0.5x", "a.jpg"),
        ("  ,, a.jpg,", "a.jpg"),
        ("a 4q, b", "b"),
        ("a (x, y) 9w, b 2w", "a"),
        ("data:image/png;base64,AA== 9x, b 1x", "b"),
        (",,,", ""),
        ("", ""),
        ("a 100w 50h, b 50w", "a"),
        ("a 1x 2x -3w 1e999x", "a"),
    ],
)
def test_srcset_gives_its_largest_candidate(srcset, address):
    assert largest_candidate(srcset) == address


BASES = [
    "http://a.example",
    "http://a.example/b/c//d/e.html?x=/y/#/z",
    "HTTP://u:p@A.example:8080/%7Eb/../c/",
    "https://a.example/b",
    "http://é.example/ü/x",
    "ftp://a.example/b/c",
    "a.example/b",
    "",
]
PLAIN = ["a", "b.jpg", "/", "../", "?", "%20", "x.y/", "=1", "1.2", "-", "https://h.example/", "..", ".", "a//b"]
ODD = [
    "//",
    "#",
    "%2e",
    "%",
    ":",
    "\\",
    "'",
    " ",
    "é",
    "&",
    "@",
    "{",
    "|",
    "\n",
    "http:",
    "http://H/",
    "http://0x7f.1/",
]


def test_the_fast_way_to_an_address_leads_where_the_parser_leads():
    draw = random.Random(0)
    for url in BASES:
        base = Base(url)
        for number in range(3000):
            pieces = PLAIN if number % 3 else PLAIN + ODD
            address = "".join(draw.choices(pieces, k=draw.randint(0, 6)))
            assert base.resolve(address) == resolve(url, address), address


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_cut_as_the_slow_twin_cuts_them(seed):
    draw = random.Random(seed)
    for _ in range(2000):
        srcset = "".join(
            draw.choices(["a", "b,c", ",", " ", "\t", "(", ")", "2x", "300w", ", "], k=draw.randint(0, 14))
        )
        assert list(split_srcset(srcset)) == split_slowly(srcset)


@pytest.mark.parametrize("text", [",", "a,", "(", "a (", "a, ", "../", "%2", "a/", "?", "a."])
def test_long_addresses_and_candidates_take_linear_time(text):
    largest_candidate(text * 300_000)
    Base("http://a.example/").resolve(text * 300_000)
