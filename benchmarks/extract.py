"""Pairs out of web archives: MB of WARC per second of processor time, beside warcio + BeautifulSoup or selectolax.

    .venv/bin/python benchmarks/extract.py [WARC ...]            (make bench NAME=extract)

Pages of 30 kB on average are made from a seed, well formed, with `base`, `srcset`, `data-src` and figures; archives
named behind the command are measured as well. All do the same work: every picture's address, resolved, with each of
its texts; the lists are compared. Ours is the stage as it runs, with its parser in a process of its own on the same
core, that process' start included.
"""

# pyright: reportMissingImports=false

import gzip
import hashlib
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import harness

PAGES = 1500
ROUNDS = 3
LAZY = ("data-src",)
Pair = tuple[str, str]
Attributes = dict[str, str | None]


def build_archive(path: Path, seed: int = 0) -> None:
    """A WARC of made pages, a gzip member a record."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlcumwfgypbvk", k=draw.randint(2, 10))) for _ in range(5000)]
    with open(path, "wb") as out:
        for number in range(PAGES):
            url = f"http://site{number % 37}.example/section/{number}.html"
            body = build_page(draw, words).encode()
            block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
            head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n"
            head += "WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
            head += f"WARC-Record-ID: <urn:uuid:{number:08d}-0000-0000-0000-000000000000>\r\n"
            record = f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"
            out.write(gzip.compress(record, 6, mtime=0))


def build_page(draw: random.Random, words: list[str]) -> str:
    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(2, most)))

    parts = [f"<!DOCTYPE html><html><head><title>{text(8)}</title><style>p {{ margin: 0 }}</style>"]
    parts.append("<base href='/media/'>" if draw.random() < 0.1 else "")
    parts.append(f"<script>var page = '{text(60)}';</script></head><body>")
    for _ in range(draw.randint(5, 60)):
        parts.append(f'<div class="{text(3)}"><h2 id="{draw.choice(words)}">{text(6)}</h2>')
        parts.append(
            f'<p>{text(80)} <a href="/{draw.choice(words)}/{draw.choice(words)}.html">{text(4)}</a> {text(30)}</p>'
        )
        kind, name = draw.random(), f"{draw.choice(words)}/{draw.choice(words)}.jpg"
        if kind < 0.4:
            parts.append(f'<img src="../pictures/{name}" alt="{text(12)}" title="{text(5)}" width="300">')
        elif kind < 0.6:
            parts.append(f'<figure><img src="/{name}" alt="{text(9)}"><figcaption>{text(15)}</figcaption></figure>')
        elif kind < 0.8:
            parts.append(f'<img src="small.gif" data-src="http://cdn.example/{name}?w=1&amp;h=2" alt="{text(9)}">')
        else:
            parts.append(f'<img src="{name}" srcset="{name} 300w, big/{name} 900w" alt="{text(7)} &amp; co">')
        parts.append("</div>")
    return "".join([*parts, "</body></html>"])


def largest(srcset: str) -> str:
    candidates = [part.split() for part in srcset.split(", ")]
    return max(candidates, key=lambda one: float(one[1][:-1]) if len(one) > 1 else 1.0)[0]


def pairs_of(base: str, attributes: Attributes, figcaption: str) -> Iterator[Pair]:
    """What the peers do with a picture."""
    texts = {" ".join(text.split()): 0 for text in (attributes.get("alt"), attributes.get("title"), figcaption) if text}
    srcset = attributes.get("srcset")
    address = largest(srcset) if srcset else attributes.get("data-src") or attributes.get("src")
    if address:
        url = urldefrag(urljoin(base, address.strip())).url
        if url.startswith(("http://", "https://")):
            yield from ((url, text) for text in texts if text)


def read_warcio(path: Path) -> Iterator[tuple[str, bytes]]:
    from warcio.archiveiterator import ArchiveIterator

    with open(path, "rb") as stream:
        for record in ArchiveIterator(stream):
            headers = record.http_headers
            if record.rec_type != "response" or headers.get_statuscode() != "200":
                continue
            if (headers.get_header("Content-Type") or "").startswith("text/html"):
                yield record.rec_headers.get_header("WARC-Target-URI"), record.content_stream().read()


def extract_beautifulsoup(path: Path) -> list[Pair]:
    from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning

    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    found: list[Pair] = []
    for url, body in read_warcio(path):
        soup = BeautifulSoup(body.decode("utf-8", "replace"), "lxml")
        base = soup.find("base", href=True)
        where = urljoin(url, str(base["href"])) if base else url
        for picture in soup.find_all("img"):
            figure = picture.find_parent("figure")
            caption = figure.find("figcaption") if figure else None
            found.extend(pairs_of(where, picture.attrs, caption.get_text(" ") if caption else ""))
    return found


def extract_selectolax(path: Path) -> list[Pair]:
    from selectolax.lexbor import LexborHTMLParser

    found: list[Pair] = []
    for url, body in read_warcio(path):
        tree = LexborHTMLParser(body)
        base = tree.css_first("base[href]")
        where = urljoin(url, base.attributes["href"]) if base else url
        captions = {}
        for figure in tree.css("figure"):
            caption = figure.css_first("figcaption")
            if caption is not None:
                captions.update({picture.mem_id: caption.text(separator=" ") for picture in figure.css("img")})
        for picture in tree.css("img"):
            found.extend(pairs_of(where, picture.attributes, captions.get(picture.mem_id, "")))
    return found


def extract_ours(path: Path) -> list[Pair]:
    import pyarrow as pa

    from diptych.curate.pages.config import OPT_OUTS
    from diptych.curate.pages.crawl import Crawl

    stage = Crawl(
        texts=("alt", "title", "figcaption"),
        lazy=LAZY,
        srcset=True,
        opt_outs=OPT_OUTS,
        page_bytes=8 << 20,
        page_seconds=5.0,
        parser_bytes=1 << 30,
    )
    found: list[Pair] = []
    for batch in stage(iter([pa.record_batch({"path": [str(path)]})])):
        batch = batch.filter(batch.column("reason").is_null())
        found.extend(zip(batch.column("image_url").to_pylist(), batch.column("caption").to_pylist(), strict=True))
    return found


EXTRACTORS: dict[str, Callable[[Path], list[Pair]]] = {
    "ours": extract_ours,
    "warcio + selectolax": extract_selectolax,
    "warcio + BeautifulSoup": extract_beautifulsoup,
}


def processor_seconds() -> float:
    """What this process and those it started and ended have used: the same on a machine that is busy otherwise."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def work(name: str, path: Path) -> None:
    """One contestant in a process of its own."""
    extract = EXTRACTORS[name]
    with gzip.open(path) as unpacked:
        size = sum(len(piece) for piece in iter(lambda: unpacked.read(1 << 20), b""))
    pairs = extract(path)
    digest = hashlib.sha256("\n".join(sorted(map(repr, pairs))).encode()).hexdigest()

    def measure() -> float:
        started = processor_seconds()
        extract(path)
        return size / 1e6 / (processor_seconds() - started)

    harness.answer(measure, pairs=len(pairs), sha256=digest, unpacked_mb=round(size / 1e6, 1))


def main() -> None:
    harness.require_peers()
    core = harness.one_core()
    rows, about = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.warc.gz"
        build_archive(made)
        for path in [made, *map(Path, sys.argv[1:])]:
            pythons = dict.fromkeys(EXTRACTORS, harness.PEERS_PYTHON) | {"ours": harness.OURS_PYTHON}
            contestants = [
                harness.Contestant(name, [python, __file__, "--work", name, path], harness.ONE_THREAD, core)
                for name, python in pythons.items()
            ]
            done = harness.run_rounds(contestants, ROUNDS)
            about[path.name] = done.about
            if path == made and len({one["sha256"] for one in done.about.values()}) != 1:
                sys.exit(f"the contestants find different pairs: {done.about}")
            rows += [done.row(path.name, "MB/s", name) for name in EXTRACTORS if name != "ours"]
    harness.report("extract", rows, about=about)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
