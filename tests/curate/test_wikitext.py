"""Wiki markup: what a reader sees stays, all else goes, and slips of authors do little harm."""

import time

import pytest

from diptych.curate.queries.wikitext import NAMESPACES, strip_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("The '''dog''' is ''good''", "The dog is good"),
        ("a [[pet]] and a [[Canis lupus|wolf]]s", "a pet and a wolfs"),
        ("a [[:Category:Dogs|list]] of [[2001: A Space Odyssey]]", "a list of 2001: A Space Odyssey"),
        ("{{Infobox|name={{lang|de|Hund}}|x={{{1|}}}}}dog", "dog"),
        ("dog{{cite|a|}} cat", "dog cat"),
        ("one<ref name=a>gone {{x}}</ref> two<ref name=b /> three", "one two three"),
        ("[[File:a.jpg|thumb|A [[cat]] and {{x}} [[dog|hound]]]]seen", "seen"),
        ("{| class=wikitable\n| a cell\n{| \n| inner\n|}\n|}\nafter", "after"),
        ("== Head ==\n* item\n# next\n: talk", "Head item next talk"),
        ("see [https://a.example/b?c the page] or https://b.example/x now", "see the page or now"),
        ("a &amp; b&nbsp;c &lt;tag", "a & b c <tag"),
        ("<b>bold</b><br/>line<!-- {{hidden -->", "bold line"),
        ("x<math>\\frac{{a}}{b}</math>y", "x y"),
        ("__NOTOC__dog", "dog"),
        ("{{never closed dog {{closed}} cat", "{{never closed dog cat"),
        ("never opened }} dog |} cat ]] [[", "never opened }} dog |} cat ]] [["),
        ("{| never closed\ndog", "{| never closed dog"),
    ],
)
def test_markup_becomes_what_a_reader_sees(markup, text):
    assert " ".join(strip_markup(markup).split()) == text


def test_namespaces_of_other_languages_are_told_apart():
    link = "[[Datei:Hund.jpg|mini|Ein Hund]] bellt"
    assert strip_markup(link).split() == ["Ein", "Hund", "bellt"]
    assert strip_markup(link, NAMESPACES | {"datei"}).split() == ["bellt"]


@pytest.mark.parametrize("bait", ["{{", "[[", "{{{|", "[[File:a|", "<ref>", "<!--", "{|\n", "'''", "[http://a ", "= ="])
def test_hostile_markup_takes_linear_time(bait):
    began = time.process_time()
    strip_markup(bait * 20_000)
    assert time.process_time() - began < 5
