import time
from datetime import UTC, datetime

import pytest

from diptych.curate.fetch.config import OPT_OUTS
from diptych.curate.fetch.robots import ALLOW_ALL, UNREACHABLE, matches, opts_out, parse_robots

RFC_EXAMPLE = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("product", "path", "allowed"),
    [
        ("anybot", "/example/page.html", False),
        ("anybot", "/publications/x.html", True),
        ("anybot", "/other/x.gif", False),
        ("anybot", "/other/x.gif?large", True),
        ("foobot", "/example/page.html", True),
        ("FooBot", "/example/allowed.gif", True),
        ("foobot", "/publications/", False),
        ("barbot", "/example/page.html", False),
        ("bazbot", "/example/page.html", False),
        ("bazbot", "/example/other.html", True),
        ("quxbot", "/example/page.html", True),
        ("quxbot", "/x.gif", True),
    ],
)
def test_the_example_of_rfc_9309_is_read_as_it_says(product, path, allowed):
    assert parse_robots(RFC_EXAMPLE, product).allows(path) is allowed


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("Allow: /example/page/\nDisallow: /example/page/disallowed.gif", "/example/page/disallowed.gif", False),
        ("Allow: /p\nDisallow: /p", "/page", True),  # of two alike, the one that allows
        ("Disallow: /\nAllow: /$", "/", True),
        ("Disallow: /\nAllow: /$", "/x", False),
        ("Disallow: /a%3cd.html", "/a%3Cd.html", False),
        ("Disallow: /a<d.html", "/a%3Cd.html", True),
        ("Disallow: /~joe/", "/%7Ejoe/index.html", False),
        ("Disallow: /ü", "/%C3%BC.jpg", False),
        ("Disallow:", "/x", True),
        ("Disallow: # nothing", "/x", True),
        ("Disallow: /x # and a comment", "/x", False),
        ("disallow : /x", "/x", False),
        ("Disallow: /*/private/*.jpg$", "/a/private/b.jpg", False),
        ("Disallow: /*/private/*.jpg$", "/a/private/b.jpg?x", True),
        ("Disallow: /", "/robots.txt", True),
        ("Nonsense\nDisallow: /x", "/x", False),
    ],
)
def test_rules(rules, path, allowed):
    assert parse_robots(f"User-agent: *\n{rules}\n", "diptych").allows(path) is allowed


def test_groups_of_the_same_name_are_one_and_other_lines_do_not_end_a_run_of_names():
    text = "User-agent: diptych/1.0\nSitemap: https://x\nUser-agent: other\nDisallow: /a\n\n"
    text += "User-agent: diptych\nDisallow: /b"
    rules = parse_robots("\ufeff" + text.replace("\n", "\r\n"), "diptych")
    assert [rules.allows(path) for path in ("/a", "/b", "/c")] == [False, False, True]


def test_a_product_that_is_named_is_not_judged_as_everybody():
    text = "User-agent: *\nDisallow: /\nCrawl-delay: 9\n\nUser-agent: diptych\nCrawl-delay: 2"
    assert parse_robots(text, "diptych").allows("/x")
    assert parse_robots(text, "diptych").crawl_delay == 2
    assert parse_robots(text, "other").crawl_delay == 9
    assert parse_robots("User-agent: *\nCrawl-delay: 86400", "x").crawl_delay == 30
    assert parse_robots("User-agent: *\nCrawl-delay: soon", "x").crawl_delay == 0


@pytest.mark.parametrize("agent", ["User-agent", "Useragent", "user agent"])
@pytest.mark.parametrize("key", ["Disallow", "Dissallow", "Disalow", "disallaw"])
def test_usual_misspellings_are_forgiven(agent, key):
    rules = parse_robots(f"{agent}: *\n{key}: /private\n", "diptych")
    assert not rules.allows("/private/a.jpg")
    assert rules.allows("/public")


def test_no_rules_allow_and_an_unreachable_site_forbids():
    assert ALLOW_ALL.allows("/x")
    assert parse_robots("", "diptych").allows("/x")
    assert not UNREACHABLE.allows("/x")


def test_many_stars_cost_no_time():
    began = time.perf_counter()
    assert not matches("/" + "*a" * 5000 + "b$", "/" + "a" * 20_000)
    assert time.perf_counter() - began < 0.5


def test_many_names_before_many_rules_cost_no_time():
    names = "".join(f"User-agent: a{number}\n" for number in range(15_000))
    rules = "".join(f"Disallow: /{number}\n" for number in range(15_000))
    began = time.perf_counter()
    assert parse_robots(names + rules, "diptych").allows("/1")
    assert not parse_robots(names + "User-agent: diptych\n" + rules, "diptych").allows("/1")
    assert time.perf_counter() - began < 1


NOW = datetime(2026, 11, 25, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "out"),
    [
        ("noai", True),
        ("NOAI", True),
        ("noarchive, noimageai", True),
        ("noml", True),
        ("noindex", True),
        ("nofollow;noindex", True),
        ("googlebot: nofollow; noai", False),
        ("none", True),
        ("noarchive, nosnippet", False),
        ("diptych: noai", True),
        ("Diptych: nofollow, noai", True),
        ("*: noai", True),
        ("googlebot: noai", False),
        ("googlebot: noindex, nofollow", False),
        ("googlebot: nofollow, diptych: noindex", True),
        ("max-snippet: 10, noai", True),
        ("max-image-preview: large", False),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", True),
        ("unavailable_after: Sunday, 25-Jun-2023 15:00:00 GMT", True),
        ("unavailable_after: 2020-09-21", True),
        ("unavailable_after: 2049-09-21", False),
        ("unavailable_after: whenever", False),
        ("", False),
    ],
)
def test_x_robots_tag(value, out):
    assert (opts_out([("X-Robots-Tag", value)], "diptych", OPT_OUTS, NOW) is not None) is out


@pytest.mark.parametrize(
    ("name", "value", "out"),
    [
        ("TDM-Reservation", "1", True),
        ("tdm-reservation", "0", False),
        ("Content-Usage", "train-ai=n", True),
        ("Content-Usage", "search=y, train-ai = n;x=1", True),
        ("Content-Usage", "train-ai=y", False),
        ("X-Other", "noai", False),
    ],
)
def test_other_headers(name, value, out):
    assert (opts_out([(name, value)], "diptych", OPT_OUTS) is not None) is out


def test_words_that_are_not_asked_for_do_not_count():
    assert opts_out([("X-Robots-Tag", "noindex")], "diptych", ("noai",)) is None
    assert opts_out([("X-Robots-Tag", "noindex"), ("X-Robots-Tag", "noai")], "diptych", ("noai",)) is not None
