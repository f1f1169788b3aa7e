"""A small site with pictures, a web server for it on loopback, and what a crawler would make of it."""

import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import archives
import pyarrow as pa
import pyarrow.parquet as pq

from samples import COLOURS, SHAPES, draw, encode

PAGES = 8


def build(folder: Path) -> None:
    """A page for each colour with a picture of each shape, and what pages have besides."""
    (folder / "pictures").mkdir(parents=True)
    for number, colour in enumerate(COLOURS[:PAGES]):
        rows = []
        for shape in SHAPES:
            name = f"{colour}-{shape}"
            picture = draw(colour, shape, size=96 + 4 * number)
            suffix = "png" if shape == "ring" else "jpg"
            (folder / "pictures" / f"{name}.{suffix}").write_bytes(
                encode(picture, "PNG" if suffix == "png" else "JPEG")
            )
            rows.append(f'<img src="pictures/{name}.{suffix}" alt="A {colour} {shape} on a white background">')
        rows.append('<img src="pictures/logo.png" alt="click to enlarge">')
        rows.append('<img src="pictures/none.jpg" alt="A picture that is not there any more">')
        rows.append(f'<img src="pictures/{colour}-dot.jpg" alt="Une image qui ne montre que des choses en {colour}">')
        body = f"<title>{colour}</title>{''.join(rows)}"
        (folder / f"{colour}.html").write_text(f'<html lang="en"><meta charset="utf-8">{body}')
    (folder / "pictures/logo.png").write_bytes(encode(draw("black", "cross", size=8), "PNG"))
    links = "".join(f'<a href="{colour}.html">{colour}</a>' for colour in COLOURS[:PAGES])
    (folder / "index.html").write_text(f"<title>all</title>{links}")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
        self.asked = Counter[str]()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is part of the test."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[Server]:
    server = Server(folder, port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def crawl(folder: Path, host: str, archive: Path) -> None:
    """A WARC of the site: by wget where there is one, else by hand; in two files, so that there are two tasks."""
    if shutil.which("wget"):
        command = ["wget", "--quiet", "--recursive", "--accept=html", "--delete-after", "--no-directories"]
        command += [f"--warc-file={archive.name}", "--no-warc-keep-log", f"http://{host}/"]
        subprocess.run(command, cwd=archive.parent, check=True, capture_output=True)
    else:
        found = [archives.page(f"http://{host}/{p.name}", p.read_bytes()) for p in sorted(folder.glob("*.html"))]
        archive.with_suffix(".warc.gz").write_bytes(archives.packed(found))
    second = [archives.page(f"http://{host}/{p.name}", p.read_bytes()) for p in sorted(folder.glob("*.html"))[:3]]
    archive.with_name("second.warc.gz").write_bytes(archives.packed(second))


def write_queries(path: Path) -> None:
    """A list of queries: what the pictures show."""
    texts = [*COLOURS, *SHAPES, "white background", "red circle", "unicorn"]
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)
