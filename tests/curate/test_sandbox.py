"""The parser's process: pages that hang, crash, eat memory or raise cost themselves only."""

import os
import signal
import time
from pathlib import Path

import pytest

from curate.misbehave import Misbehave
from diptych.curate.pages.extract import Extract
from diptych.curate.pages.page import Page
from diptych.curate.pages.sandbox import PAGE_CRASH, PAGE_ERROR, PAGE_MEMORY, PAGE_TIME, Parser, ParserStartError

EXTRACT = Extract(texts=("alt",), lazy=(), srcset=True, opt_outs=())
GOOD = b"<img src=a alt=b>"
WANTED = [["http://a.example/a"], ["b"], ["alt"], [None], [None], [None]]


def page(body: bytes, url: str = "http://a.example/") -> Page:
    return Page("html", url, "", "", body)


def parser(extract, page_seconds: float = 1.0) -> Parser:
    return Parser(extract, page_seconds=page_seconds, memory=512 << 20)


def test_bad_pages_cost_themselves_only(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    bodies = [b"1", b"hang", b"2", b"kill", b"3", b"eat", b"eat slowly", b"raise", b"odd", b"4", b"print", b"5"]
    with parser(Misbehave()) as parse:
        answers = parse([page(body) for body in bodies])
        assert parse.replaced == 4
        again = parse([page(b"6")])
    expected = [[["1"]], PAGE_TIME, [["2"]], PAGE_CRASH, [["3"]], PAGE_MEMORY, PAGE_MEMORY]
    expected += [PAGE_ERROR, PAGE_ERROR, [["4"]]]
    assert answers == [*expected, [["print"]], [["5"]]]
    assert again == [[["6"]]]


def test_a_page_that_hangs_the_real_parser_is_ended_in_time():
    began = time.monotonic()
    deep = b"<div>" * 400_000 + GOOD  # the tree builder needs minutes for it
    with parser(EXTRACT, 0.5) as parse:
        assert parse([page(GOOD), page(deep), page(GOOD)]) == [WANTED, PAGE_TIME, WANTED]
    assert time.monotonic() - began < 15


def test_a_page_that_stops_the_clock_is_ended_too(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with parser(Misbehave()) as parse:
        parse._still = 1.5
        assert parse([page(b"1"), page(b"stop"), page(b"2")]) == [[["1"]], PAGE_TIME, [["2"]]]


def test_what_earlier_batches_left_behind_costs_no_page(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with parser(Misbehave()) as parse:
        assert [parse([page(b"keep")]) for _ in range(6)] == [[[["keep"]]]] * 6
        assert parse.replaced == 0


def test_the_time_of_a_page_is_not_spent_on_talking(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with parser(Misbehave(), 0.02) as parse:
        parse([page(b"1")])
        assert parse._process is not None
        number = parse._process.pid
        assert parse([page(b"2", "x" * (100 << 20))]) == [[["2"]]]
        assert parse._process.pid == number


def test_a_parser_killed_between_batches_is_replaced():
    with parser(EXTRACT) as parse:
        assert parse([page(GOOD)]) == [WANTED]
        assert parse._process is not None
        os.kill(parse._process.pid, signal.SIGKILL)
        assert parse([page(GOOD)] * 3) == [WANTED] * 3


def test_answers_keep_their_order_over_many_pages_and_large_batches():
    pages = [page(b"<img src=%d alt='x%s'>" % (i, b"y" * (i * 37 % 5000))) for i in range(2000)]
    with parser(EXTRACT) as parse:
        answers = parse(pages)
        assert parse([]) == []
    assert [answer[0][0] for answer in answers] == [f"http://a.example/{i}" for i in range(2000)]


def test_a_parser_that_cannot_start_says_why(tmp_path):
    with parser(EXTRACT) as parse:
        parse._setup = b"no pickle"
        with pytest.raises(ParserStartError, match=r"does not start: .*Error"):
            parse([page(GOOD)])


def test_nothing_is_left_running():
    with parser(EXTRACT) as parse:
        parse([page(GOOD)])
        assert parse._process is not None
        number = parse._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
