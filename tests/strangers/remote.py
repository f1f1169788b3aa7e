"""What lies at an address: bodies without an end, bombs, wrong lengths, circles of redirects, answers drop by drop."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from strangers.case import Case, Outcome, World, refused_or_right
from strangers.world import FINETUNE, copy

KIND = "remote"


class _Answers(BaseHTTPRequestHandler):
    """The first part of the path says what is answered."""

    def do_GET(self) -> None:
        self.server.asked.touch()  # type: ignore[attr-defined]
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

    def __init__(self, asked: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked = asked
        """Made as soon as anything is asked: a case that ends before proves nothing."""

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
ROWS = 3
HIDDEN = [
    "http://user:HIDDENPASSWORD@127.0.0.1:1/x",
    "s3://KEY:HIDDENPASSWORD@bucket/x",
    "http://127.0.0.1:1/x?sig=HIDDENPASSWORD",
    "http://{host}/500/x.tar?sig=HIDDENPASSWORD",
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
        train, fetch = partial(_train, world, fault), partial(_fetch, world, fault)
        yield Case(KIND, f"train on what answers {fault}", train, check=_asked, seconds=120)
        yield Case(KIND, f"fetch what answers {fault}", fetch, check=_fetched, seconds=120)
    for number, url in enumerate(HIDDEN):
        make = partial(_hidden, world, url)
        yield Case(KIND, f"a password in an address {number}", make, check=_keeps_secret, seconds=180)
    make = partial(_fetch, world, None)
    yield Case(KIND, "fetch from private addresses", make, check=_not_asked, inputs=len(PRIVATE))


def serve(folder: Path) -> str:
    """Started in the case's own process, so that it ends with it."""
    server = _Server(folder / "asked")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"127.0.0.1:{server.server_address[1]}"


def _train(world: World, fault: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    return [*FINETUNE, "--data", f"http://{serve(folder)}/{fault}/shards"]


def _fetch(world: World, fault: str | None, folder: Path) -> list[str]:
    """The addresses of a part that was crawled are others: those of a fault, else private ones."""
    from diptych import files
    from diptych.stage.folder import read_manifest, save_manifest

    copy(world, folder, "crawl")
    host = serve(folder)
    private = [*PRIVATE, f"http://{host}/x.jpg", f"http://localhost:{host.rpartition(':')[2]}/x.jpg"]
    addresses = private if fault is None else [f"http://{host}/{fault}/{i}.jpg" for i in range(ROWS)]
    manifest = read_manifest(folder / "crawl")
    (part,) = (folder / "crawl").glob("*.parquet")
    table = pq.read_table(part)
    table = table.take([i % len(table) for i in range(len(addresses))])
    for name, values in (("image_url", addresses), ("key", [f"{i:032x}" for i in range(len(addresses))])):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values))
    pq.write_table(table, part)
    save_manifest(folder / "crawl", replace(manifest, files=manifest.files | {part.name: files.sha256(part)}))
    return [
        *("curate", "fetch", "--folder", "crawl", "--out", "out", "--processes", "1"),
        *("--contact", "https://one.test/", "--no-robots", "--deadline", "5", "--attempts", "1"),
        *([] if fault is None else ["--allow-host", host]),
    ]


def _hidden(world: World, url: str, folder: Path) -> list[str]:
    copy(world, folder, "model")
    return [*FINETUNE, "--data", url.format(host=serve(folder))]


def _asked(outcome: Outcome) -> str | None:
    return refused_or_right(outcome) if (outcome.folder / "asked").exists() else "nothing was asked"


def _fetched(outcome: Outcome) -> str | None:
    return _asked(outcome) or _counted(outcome, ROWS)


def _not_asked(outcome: Outcome) -> str | None:
    if (outcome.folder / "asked").exists():
        return "a private address was asked"
    return _counted(outcome, len(PRIVATE) + 2)


def _counted(outcome: Outcome, rows: int) -> str | None:
    report = json.loads((outcome.folder / "out" / "manifest.json").read_text())
    held = report["rows"] == sum(report["dropped"].values()) == rows
    return None if held else f"{rows} rows became {report['kept']} and {report['dropped']}"


def _keeps_secret(outcome: Outcome) -> str | None:
    text = outcome.out + outcome.err
    kept = [p for p in outcome.folder.rglob("*") if p.is_file() and b"HIDDENPASSWORD" in p.read_bytes()]
    return f"the password is in {kept or 'what was printed'}" if kept or "HIDDENPASSWORD" in text else None
