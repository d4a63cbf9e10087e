"""Requests as bytes on a socket: targets that no client library would send."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

__all__ = ["RawAnswer", "raw_request"]

PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RawAnswer:
    """What came back.

    Attributes:
        status: 0 if the connection ended without an answer.
        problem: the fields of a problem answer; empty for any other.
        headers: of the answer.
        text: the body.
    """

    status: int
    problem: dict[str, Any]
    headers: http.client.HTTPMessage
    text: str

    @property
    def code(self) -> str | None:
        """The problem's code."""
        return self.problem.get("code")


def raw_request(
    url: str,
    method: str,
    target: bytes,
    *,
    token: str | None = None,
    body: bytes = b"",
    unsent_bytes: int = 0,
) -> RawAnswer:
    """Send one request with its target as it stands, and read the answer to its end.

    Args:
        url: the server's.
        method: as it goes on the wire.
        target: likewise.
        token: bearer token.
        body: what is sent of the body.
        unsent_bytes: of the body, announced and never sent.
    """
    address = url.removeprefix("http://")
    host, port = address.rsplit(":", 1)
    lines = [
        method.encode() + b" " + target + b" HTTP/1.1",
        b"Host: " + address.encode(),
        b"Content-Length: %d" % (len(body) + unsent_bytes),
        b"Connection: close",
    ]
    if token is not None:
        lines.append(b"Authorization: Bearer " + token.encode())
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as link:
        link.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        return _read_answer(link, method)


def _read_answer(link: socket.socket, method: str) -> RawAnswer:
    answer = http.client.HTTPResponse(link, method=method)
    text = ""
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        answer.begin()
        text = answer.read().decode(errors="replace")
    status = getattr(answer, "status", 0)
    headers = getattr(answer, "headers", None) or http.client.HTTPMessage()
    told = isinstance(status, int) and headers.get_content_type() == "application/problem+json"
    return RawAnswer(
        status=status if isinstance(status, int) else 0,
        problem=json.loads(text) if told and text else {},
        headers=headers,
        text=text,
    )
