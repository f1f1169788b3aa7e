"""What lies at an address: bodies without an end, bombs, wrong lengths, circles of redirects, answers drop by drop."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from strangers.case import Case, World, refused_or_right
from strangers.world import FINETUNE, copy

KIND = "remote"


class _Answers(BaseHTTPRequestHandler):
    """The first part of the path says what is answered."""

    def do_GET(self) -> None:
        fault = self.path.split("/")[1]
        with_body = self.command == "GET"
        if fault == "circle":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if fault in ("404", "500", "429"):
            self.send_error(int(fault))
            return
        self.send_response(200)
        length = {"negative": "-5", "words": "x", "longer": "999999", "huge": str(1 << 60)}.get(fault)
        if length:
            self.send_header("Content-Length", length)
        if fault == "bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if not with_body:
            return
        if fault == "endless":
            while True:
                self.wfile.write(bytes(1 << 20))
        if fault == "bomb":
            self.wfile.write(gzip.compress(bytes(1 << 30), 1))
        elif fault == "trickle":
            for _ in range(3):
                self.wfile.write(b" ")
                time.sleep(1)
        else:
            self.wfile.write(BODIES.get(fault, b"<!DOCTYPE html>"))

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who gives up on an answer is right."""


def listing(**changes: object) -> bytes:
    entry = {"name": "00000.tar", "samples": 8, "bytes": 100, **changes}
    return json.dumps({"format": 1, "shards": [entry], "samples": 8}).encode()


BODIES = {
    "deep": b"[" * 100_000,
    "list": b"[]",
    "none": b"",
    "names-out": listing(name="../../../etc/passwd"),
    "names-nul": listing(name="a\0b.tar"),
    "names-long": listing(name="x" * 5000),
    "names-number": listing(name=5),
    "names-address": listing(name="http://169.254.169.254/x"),
    "sizes-negative": listing(bytes=-5),
    "sizes-huge": listing(bytes=1 << 80),
    "sizes-text": listing(bytes="x"),
    "binary": bytes(range(256)) * 20,
}
FAULTS = ("endless", "bomb", "trickle", "circle", "404", "500", "negative", "words", "longer", "huge", *BODIES)
HIDDEN = [
    "http://user:HIDDENPASSWORD@127.0.0.1:1/x",
    "s3://KEY:HIDDENPASSWORD@bucket/x",
    "http://127.0.0.1:1/x?sig=HIDDENPASSWORD",
]
PRIVATE = [
    "http://127.0.0.1/",
    "http://169.254.169.254/latest",
    "http://[::1]/",
    "http://0x7f000001/",
    "http://localhost/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "gopher://127.0.0.1/",
    "http://2130706433/",
    "http://10.0.0.1/",
]


def iter_cases(world: World) -> Iterator[Case]:
    for fault in FAULTS:
        yield Case(
            KIND, f"train on what answers {fault}", partial(_train, world, fault), check=refused_or_right, seconds=120
        )
        yield Case(
            KIND,
            f"fetch what answers {fault}",
            partial(_fetch, world, [f"/{fault}/x.jpg"], True),
            check=refused_or_right,
            seconds=120,
        )
    for number, url in enumerate(HIDDEN):
        yield Case(
            KIND, f"a password in an address {number}", partial(_hidden, world, url), check=_keeps_secret, seconds=180
        )
    yield Case(
        KIND,
        "fetch from private addresses",
        partial(_fetch, world, PRIVATE, False),
        check=refused_or_right,
        inputs=len(PRIVATE),
    )


def serve() -> str:
    """Started in the case's own process, so that it ends with it."""
    server = _Server(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def _train(world: World, fault: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    return [*FINETUNE, "--data", f"{serve()}/{fault}/shards"]


def _fetch(world: World, urls: list[str], own: bool, folder: Path) -> list[str]:
    copy(world, folder, "crawl")
    host = serve()
    part = next((folder / "crawl").rglob("*.parquet"))
    table = pq.read_table(part)
    addresses = [host + urls[0] if own else urls[i % len(urls)] for i in range(len(table))]
    place = table.schema.get_field_index("image_url")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(addresses)), part)
    _vouch(folder / "crawl", part)
    options = [
        "--contact",
        "https://one.test/",
        "--no-robots",
        "--processes",
        "1",
        "--deadline",
        "5",
        "--attempts",
        "1",
    ]
    return [
        "curate",
        "fetch",
        "--folder",
        "crawl",
        "--out",
        "out",
        *options,
        *(["--allow-host", host[7:]] if own else []),
    ]


def _vouch(folder: Path, part: Path) -> None:
    """Whoever forges a part forges its sums too."""
    from diptych import files

    for path in (folder / "manifest.json", *(folder / "done").glob("*.json")):
        text = path.read_text()
        name = part.relative_to(folder).as_posix()
        for record in (json.loads(text),):
            if name in record.get("files", {}):
                record["files"][name] = files.sha256(part)
                path.write_text(json.dumps(record))


def _hidden(world: World, url: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    return [*FINETUNE, "--data", url]


def _keeps_secret(outcome: object) -> str | None:
    text = outcome.out + outcome.err  # type: ignore[attr-defined]
    kept = [p for p in outcome.folder.rglob("*") if p.is_file() and b"HIDDENPASSWORD" in p.read_bytes()]  # type: ignore[attr-defined]
    return f"the password is in {kept or 'what was printed'}" if kept or "HIDDENPASSWORD" in text else None
