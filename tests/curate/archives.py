"""Archives made by hand, for the tests of the crawl."""

import gzip
import json


def record(kind: str, url: str, block: bytes, content_type: str = "application/http; msgtype=response") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


def http(body: bytes, *headers: str, status: str = "200 OK", content_type: str = "text/html") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def page(url: str, body: bytes, *headers: str, **more: str) -> bytes:
    return record("response", url, http(body, *headers, **more))


def wat(url: str, links: list[dict], **head: object) -> bytes:
    html = {"Head": head, "Links": links}
    envelope = {"Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}}}
    return record("metadata", url, json.dumps({"Envelope": envelope}).encode(), "application/json")


def packed(records: list[bytes], level: int = 6) -> bytes:
    return b"".join(gzip.compress(one, level, mtime=0) for one in records)
