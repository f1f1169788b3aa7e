"""Pictures and texts of pages: against the slow twin, the standard's addresses, and pages made to harm."""

import random

import pytest

from curate.archives import wat
from diptych.curate.pages import extract as parts
from diptych.curate.pages.charset import decode
from diptych.curate.pages.extract import Extract, Found
from diptych.curate.pages.links import URL_SCHEME
from diptych.curate.pages.page import Page
from reference.extract import find_pairs

EXTRACT = Extract(texts=("alt", "title", "figcaption"), lazy=("data-src",), srcset=True, opt_outs=("noai", "noindex"))


def look(html: str | bytes, url: str = "http://a.example/b/c.html", charset: str = "", robots: str = ""):
    body = html.encode() if isinstance(html, str) else html
    return EXTRACT(Page("html", url, charset, robots, body))


def pairs(found: Found | str) -> list[tuple[str, str]]:
    assert isinstance(found, Found)
    return [(url, text) for url, text, *_, reason in zip(*found, strict=True) if reason is None]


def write_page(draw: random.Random, depth: int = 0) -> str:
    """Well-formed HTML with everything that matters in it."""

    def word() -> str:
        return draw.choice(["dog", "é", "🐶", "a&amp;b", "&quot;x&quot;", "  two  words ", "&#x4e00;", "1 &lt; 2"])

    def name() -> str:
        return draw.choice(["a.jpg", "/b.png", "../c/d.gif", "//x.example/e", "http://y.example/f?g=1&amp;h#i", "?q"])

    made = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.randint(0, 9) if depth < 5 else 0
        if kind < 4:
            attributes = [f'src="{name()}"', f"alt='{word()}'", f'title="{word()}"', f'data-src="{name()}"']
            attributes.append(f'srcset="{name()} 300w, {name()} 900w"')
            chosen = draw.sample(attributes, draw.randint(0, 5))
            made.append(f"<img {' '.join(chosen)}>" if draw.random() < 0.8 else f"<IMG {' '.join(chosen)} />")
        elif kind < 6:
            made.append(
                f"<figure>{write_page(draw, depth + 1)}<figcaption>{word()}<b>{word()}</b>{word()}"
                f"<{draw.choice(['p', 'i', 'h2', 'span'])}>{word()}</figcaption></figure>"
            )
        elif kind == 6:
            made.append("<!-- <img src=no alt=no> --><script>'<img src=no alt=no>'</script>")
        elif kind == 7:
            made.append(f"<template>{write_page(draw, 9)}</template>")
        else:
            made.append(f"<div>{word()}{write_page(draw, depth + 1)}</div>")
    return "".join(made)


@pytest.mark.parametrize("seed", range(40))
def test_extraction_equals_the_slow_twin(seed):
    draw = random.Random(seed)
    base = draw.choice(["", "", "<base href='/z/'>", "<base target=_top><base href='http://q.example/r/s'>"])
    html = f"<html><head>{base}</head><body>{''.join(write_page(draw) for _ in range(5))}</body></html>"
    assert pairs(look(html)) == find_pairs(html, "http://a.example/b/c.html", ["data-src"])


def test_base_counts_once_and_only_if_it_works():
    picture = "<img src=i alt=t>"
    for base, url in {
        "<base href='http://x.example/z/'><base href=//q.example/>": "http://x.example/z/i",
        "<base href='data:,x'><base href='/z/'>": "http://a.example/b/i",
        "<base href='http://['>": "http://a.example/b/i",
        "<base>": "http://a.example/b/i",
    }.items():
        assert pairs(look(base + picture)) == [(url, "t")]


def test_what_is_not_shown_is_not_found():
    hidden = "<template><img src=t alt=t></template><!--<img src=c alt=c>--><textarea><img src=x alt=x></textarea>"
    hidden += "<iframe><img src=f alt=f></iframe><style><img src=s alt=s></style><im\0g src=n alt=n>"
    assert pairs(look(f"{hidden}<noscript><img src=n alt=shown></noscript>")) == [("http://a.example/b/n", "shown")]


def test_pictures_without_an_address_have_a_reason():
    found = look("<img alt=a src='data:,x'><img alt=b src='javascript:x()'><img alt=c><img alt=d src='http://['>")
    assert isinstance(found, Found)
    assert found.reasons == ["url_scheme", "url_scheme", "url_invalid", "url_invalid"]
    assert found.image_urls == [""] * 4


def test_picture_sources_stand_in_for_a_placeholder():
    assert pairs(look("<picture><source srcset='a 1x, b 2x'><img alt=t></picture>")) == [("http://a.example/b/b", "t")]


def test_each_text_says_where_it_stood_and_how_large_the_picture_is():
    found = look(
        "<figure><img src=a alt='x  y' title='x y' width=' 300px' height=12345><figcaption>z</figcaption>"
        "<figcaption>no</figcaption></figure><img src=b alt=t width=auto>"
    )
    assert isinstance(found, Found)
    assert (found.captions, found.origins) == (["x y", "z", "t"], ["alt", "figcaption", "alt"])
    assert (found.widths, found.heights) == (["300", "300", None], ["12345", "12345", None])


def test_words_of_a_caption_end_at_blocks_and_breaks_only():
    for html, text in {
        "The <b>W</b>ikipedia logo, H<sub>2</sub>O; caf<wbr>é": "The Wikipedia logo, H2O; café",
        "Photo by <a href=x>Jane</a>, <b>Paris</b>": "Photo by Jane, Paris",
        "<p>one</p><p>two</p>three<br>four<ul><li>five<li>six</ul>": "one two three four five six",
        "<table><tr><td>a<td>b</table><div>c<div>d</div></div>e": "a b c d e",
    }.items():
        assert pairs(look(f"<figure><img src=i><figcaption>{html}</figcaption></figure>"))[0][1] == text


def test_the_address_is_the_one_that_is_shown_in_the_end():
    for attributes, name in {
        "src=a data-src=b": "b",
        "src=a data-src=b srcset='c 1x, d 2x'": "d",
        "src=a data-src=b srcset='c 2x' data-srcset=e": "e",
        "src=a data-src='{\"x\": 1}'": "a",
        "src=a data-src='[1]'": "a",
        "src=a data-src=' '": "a",
        "src=' a\n'": "a",
    }.items():
        assert pairs(look(f"<img {attributes} alt=t>")) == [(f"http://a.example/b/{name}", "t")], attributes


@pytest.mark.parametrize(
    ("meta", "robots", "out"),
    [
        ("<meta name=robots content='NoAI, follow'>", "", True),
        ("<meta name=' ROBOTS ' content=noai>", "", True),
        ("<meta name=diptych content=noai>", "", True),
        ("<meta name=robots content=none>", "", True),
        ("<meta name=robots content=noindex>", "", True),
        ("<meta name=googlebot content=noai>", "", False),
        ("<meta name=robots content=nofollow>", "", False),
        ("<meta name=robots content='no ai'>", "", False),
        ("", "noindex, noai", True),
        ("", "nofollow;noindex", True),
        ("", "otherbot: noindex; nofollow", False),
        ("", "otherbot: noai", False),
        ("", "diptych: noai", True),
        ("", "max-image-preview: large", False),
    ],
)
def test_opt_outs_are_honoured(meta, robots, out):
    assert (look(f"{meta}<img src=a alt=b>", robots=robots) == parts.OPT_OUT) is out


@pytest.mark.parametrize(
    ("body", "header", "text"),
    [
        ("é".encode(), "", "é"),
        (b"\xe9t\xe9 \x93", "", "été “"),
        (b"\xe9", "ISO-8859-1", "é"),
        ("café".encode(), "ISO-8859-1", "café"),
        (b"<meta charset=latin1>" + "café“".encode(), "", "café“"),
        ("café".encode() + b"\xe9", "ISO-8859-1", "cafÃ©é"),
        ("Привет".encode("cp1251"), "windows-1251", "Привет"),
        (b"<meta charset='Shift_JIS'>" + "犬".encode("cp932"), "", "犬"),
        (b"<meta http-equiv=content-type content='text/html; charset=koi8-r'>" + "кот".encode("koi8_r"), "", "кот"),
        (b"<!-- <meta charset=koi8-r> --><meta charset=utf-8>" + "é".encode(), "", "é"),
        (b"<meta charset=utf-16>" + "é".encode(), "", "é"),
        ("\ufeffé".encode("utf-16-le"), "utf-8", "é"),
        ("\ufeffé".encode("utf-16-be"), "", "é"),
        ("\ufeffé".encode(), "windows-1252", "é"),
        ("é".encode(), "rot13", "é"),
        ("é".encode(), "unicode_escape", "é"),
        ("犬".encode("gb18030"), "GB2312", "犬"),
        ("é".encode()[:1] + b" x", "utf-8", "\ufffd x"),
        (b"<meta charset=koi8-r>" + "é".encode(), "utf-8", "é"),
        ("犬".encode() + b"\xe7", "", "犬\ufffd"),
        (b" " * 1024 + b"<meta charset=koi8-r>" + "é".encode(), "", "é"),
        ("ğ".encode("cp1254"), "iso88599", "ğ"),
        ("жук".encode("iso8859_5"), "ISO_8859-5:1988", "жук"),
        (b"\x80!", "gbk", "\ufffd!"),
        ("㐀".encode("gb18030"), "gbk", "㐀"),
        (b"<meta charset=x-user-defined>\xe9", "", "é"),
    ],
)
def test_characters_are_those_of_the_page(body, header, text):
    decoded = decode(body, header)
    decoded = decoded.decode("utf-8", "replace") if isinstance(decoded, bytes) else decoded
    assert decoded.endswith(text)


def test_a_guess_counts_when_nothing_else_says():
    assert decode("Привет".encode("cp1251"), "", lambda _: "windows-1251") == "Привет"
    assert decode("é".encode(), "", lambda _: "windows-1251") == "é".encode()
    assert decode(b"\xe9!", "", lambda _: "utf-8") == "é!"  # it is not
    assert decode(b"\xe9!", "", lambda _: None) == "é!"
    assert decode(b"\xe9!", "", lambda _: "iso-2022-kr") == "é!"  # the standard's refusal is only for who says it


def test_encodings_that_can_hide_markup_give_no_page():
    for label in ("hz-gb-2312", "iso-2022-kr", "iso-2022-cn"):
        assert not pairs(look("<img src=a alt=b>", charset=label))


def test_entities_nuls_and_megabytes_do_no_harm():
    assert pairs(look('<img src=a alt="&eacute;&amp;amp;&#0;\0">')) == [("http://a.example/b/a", "é&amp;\ufffd\ufffd")]
    found = look(f"<img src=a alt='{'x ' * 500_000}'>")
    assert isinstance(found, Found)
    assert (found.reasons, len(found.captions[0])) == ([parts.TEXT_TOO_LONG], 8192)
    found = look(f"<img src='data:image/png;base64,{'A' * 2_000_000}' alt=t>")
    assert isinstance(found, Found)
    assert (found.image_urls, found.reasons) == ([""], [URL_SCHEME])
    assert look("<img src=a alt=b>" * 20_000) == parts.PAGE_TOO_MANY
    assert pairs(look("<p><img src=a alt='b' <p>'>\"<b><img src=c alt=d")) == [("http://a.example/b/a", "b")]


def test_wat_records_give_what_their_pages_say():
    links = [{"path": "IMG@/src", "url": "i.jpg", "alt": " two  words "}, {"path": "A@/href", "url": "x", "alt": "no"}]
    links += [{"path": "IMG@/data-src", "url": "/j.jpg", "alt": "t"}, {"path": "IMG@/usemap", "url": "x", "alt": "no"}]
    body = wat("http://a.example/b/", links, Base="http://x.example/y/").partition(b"\r\n\r\n")[2]
    assert pairs(EXTRACT(Page("wat", "http://a.example/b/", "", "", body))) == [
        ("http://x.example/y/i.jpg", "two words"),
        ("http://x.example/j.jpg", "t"),
    ]
    body = wat("http://a.example/", links, Metas=[{"name": "robots", "content": "noai"}]).partition(b"\r\n\r\n")[2]
    assert EXTRACT(Page("wat", "http://a.example/", "", "", body)) == parts.OPT_OUT
    assert EXTRACT(Page("wat", "", "", "", b"{")) == parts.PAGE_JSON
    assert EXTRACT(Page("wat", "", "", "", b'{"Envelope": []}')) == parts.PAGE_JSON
    assert pairs(EXTRACT(Page("wat", "", "", "", b'{"Envelope": {}}'))) == []
