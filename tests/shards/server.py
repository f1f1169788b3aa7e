"""A real HTTP server on loopback that serves a folder, counts what is asked for, and fails on demand."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked = Counter[str]()
        self.fault: Callable[[str, int, bytes], tuple[int, bytes, float] | None] = lambda name, nth, body: None
        """Name, how often it was asked for, body -> status, what is sent of the body, seconds to send it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name = self.path.lstrip("/")
        file = self.server.folder / name
        if not file.is_file():
            self.send_error(404)
            return
        body = file.read_bytes()
        status, sent, seconds = 200, body, 0.0
        if with_body:
            self.server.asked[name] += 1
            status, sent, seconds = self.server.fault(name, self.server.asked[name], body) or (200, body, 0.0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(sent[: len(sent) // 2])
            time.sleep(seconds)
            self.wfile.write(sent[len(sent) // 2 :])

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
