"""Small real things for tests of the fetch: a server of many pictures, a folder of pairs, a fetch in a process."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from diptych.curate.fetch.config import FetchConfig
from diptych.curate.fetch.run import FetchReport, run
from diptych.curate.rows import CANDIDATES, key_of, with_reason
from diptych.stage.job import Task
from diptych.stage.run import Engine, part_name

engine = Engine()


@dataclass(frozen=True)
class Listed:
    """A stage that makes pairs of JSON files of addresses."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path in batch.column("path").to_pylist():
                rows = [
                    {
                        "key": key_of(url or "", "a caption"),
                        "caption": "a caption",
                        "image": None,
                        "image_url": url,
                        "page_url": "http://page.test/",
                        "details": '{"from": "alt"}',
                    }
                    for url in json.loads(Path(path).read_text())
                ]
                made = pa.RecordBatch.from_pylist(rows, schema=CANDIDATES)
                yield with_reason(made, [None] * len(rows))


def write_pairs(folder: Path, urls: list[str | None], per_part: int = 100) -> Path:
    """A finished stage whose rows have these addresses."""
    folder.mkdir(parents=True)
    tasks = []
    for i, start in enumerate(range(0, len(urls), per_part)):
        path = folder / f"urls-{i:05d}.json"
        path.write_text(json.dumps(urls[start : start + per_part]))
        tasks.append(Task(part_name(i), (path,), rows=False))
    engine.run_stage(Listed(), tasks, folder / "pairs", {}, schema=CANDIDATES)
    return folder / "pairs"


class Pictures(ThreadingHTTPServer):
    """Serves /NUMBER.jpg, each a picture of its own, and counts how often each was asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.seconds = seconds
        self.answer: Callable[[str, int], tuple[int, bytes, dict[str, str]] | None] = lambda path, nth: None
        """Path, how often it was asked for -> status, body, headers; None for the picture."""

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def url(self, number: int) -> str:
        return f"http://{self.place}/{number}.jpg"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    server: Pictures
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        time.sleep(self.server.seconds)
        made = self.server.answer(self.path, self.server.asked[self.path])
        if made is None and self.path == "/robots.txt":
            made = 404, b"", {}
        status, body, headers = made or (200, draw(int(self.path[1:].removesuffix(".jpg"))), {})
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def draw(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A picture of its own for every number."""
    image = Image.new("RGB", size, (number % 256, number // 256 % 256, 128))
    image.putpixel((number % 40, 7), (255, 255, 255))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@contextmanager
def serve(seconds: float = 0.0) -> Iterator[Pictures]:
    server = Pictures(seconds)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config_for(folder: Path, out: Path, server: Pictures | None, **changes: Any) -> FetchConfig:
    settings = {
        "contact": "https://example.org/crawler",
        "allow_host": (server.place,) if server else (),
        "backoff": 0.01,
    }
    return FetchConfig(folder=folder, out=out, **(settings | {"concurrency": 8, "per_host": 8} | changes))


def fetch(config: FetchConfig) -> FetchReport:
    return run(config, engine=engine)


def kill_and_finish(folder: Path, out: Path, server: Pictures, pictures: int, kills: int) -> int:
    """Start a fetch again and again; kill it each time another share of the pictures was asked; the last one ends."""
    killed = 0
    command = [sys.executable, __file__, str(folder), str(out), server.place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    while True:
        process = subprocess.Popen(command, env=environment)
        goal = pictures * (killed + 1) / (kills + 1)
        while killed < kills and process.poll() is None and server.asked.total() < goal:
            time.sleep(0.002)
        if killed == kills or process.poll() is not None:
            assert process.wait(60) == 0
            return killed
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1


if __name__ == "__main__":  # python fetching.py FOLDER OUT HOST:PORT [PARTITIONS]: a fetch that can be killed
    settings = {"contact": "https://example.org/crawler", "allow_host": (sys.argv[3],), "min_side": 8}
    settings |= {"concurrency": 8, "per_host": 8, "partitions": int((*sys.argv, 1)[4])}
    fetch(FetchConfig(folder=Path(sys.argv[1]), out=Path(sys.argv[2]), **settings))
