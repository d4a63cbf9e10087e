"""A reverse proxy that breaks the answers to chosen calls: what stands before real engines."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

__all__ = ["FAULTS", "BadGateway", "bad_gateway"]

PAGE = b"<html><body><h1>504 Gateway Time-out</h1></body></html>"
FAULTS = {
    "504": (504, "text/html", PAGE),
    "502": (502, "text/html", PAGE),
    "401": (401, "application/json", b'{"detail": "log in first"}'),
    "problem": (503, "application/problem+json", b'{"type": "about:blank", "code": "overloaded"}'),
    "redirect": (302, "text/html", PAGE),
    "page": (200, "text/html", PAGE),
    "empty": (200, "application/json", b""),
    "half": (200, "application/json", b'{"version": 1, "request_id": "'),
    "garbled": (200, "application/json", b"\x1f\x8b\x08 no gzip"),
}
"""Answers that are not the engine's, by name; besides them `reset`, `cut` and `hang`."""


@dataclass
class BadGateway:
    """What to break; may be changed at any time.

    Attributes:
        upstream: the engine's base url.
        url: its own.
        faults: by path below the prefix, the name of what the caller gets instead.
        times: how often each; without an entry for ever.
        delivery: what becomes of a request whose answer is broken: it is sent on `now`, `never`,
            or once `deliver` is set (`late`).
        answered: what the engine answered to requests whose callers were told something else.
    """

    upstream: str
    url: str = ""
    faults: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    delivery: str = "now"
    deliver: threading.Event = field(default_factory=threading.Event)
    answered: list[tuple[int, bytes]] = field(default_factory=list)

    def heal(self) -> None:
        """Pass everything on."""
        self.faults.clear()

    def fault(self, path: str) -> str | None:
        """What this call gets."""
        path = path.removeprefix("/admin/v1")
        if path not in self.faults or self.times.get(path, 1) <= 0:
            return None
        if path in self.times:
            self.times[path] -= 1
        return self.faults[path]

    def forward(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, str, bytes]:
        """The engine's answer: status, content type, body."""
        where = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("content-type", ""), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gateway: BadGateway

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        kept = ("authorization", "content-type", "content-encoding")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        request = (self.command, self.path, body, headers)
        fault = self.gateway.fault(self.path)
        if fault is None:
            self._answer(*self.gateway.forward(*request))
            return
        if self.gateway.delivery != "never":
            threading.Thread(target=self._deliver, args=(request,), daemon=True).start()
        self.close_connection = True
        if fault == "hang":
            time.sleep(60)
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"version": ')
        else:
            self._answer(*FAULTS[fault])

    do_GET = do_POST = _handle

    def _deliver(self, request: tuple[str, str, bytes, dict[str, str]]) -> None:
        if self.gateway.delivery == "late":
            self.gateway.deliver.wait()
        status, _, body = self.gateway.forward(*request)
        self.gateway.answered.append((status, body))

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        with suppress(OSError):  # a caller that was interrupted
            self.send_response(status)
            self.send_header("content-type", content_type)
            if body.startswith(b"\x1f\x8b"):
                self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextmanager
def bad_gateway(upstream: str) -> Iterator[BadGateway]:
    """A proxy before a server, for as long as a context lasts."""
    gateway = BadGateway(upstream)
    handler = type("_OfOne", (_Handler,), {"gateway": gateway})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    gateway.url = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    serving.start()
    try:
        yield gateway
    finally:
        server.shutdown()
        serving.join(10)
        server.server_close()
