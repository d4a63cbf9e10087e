"""A proxy between a trainer and an engine's HTTP, which can be told to misbehave."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from typing import Literal

__all__ = ["Proxy", "Trouble"]

Trouble = Literal["502", "504", "reset", "hold", "cut", "gone"]
WAITING = re.compile(rb"POST \S*/weights/(update|prepare|commit)\b")
"""The calls whose answers are waited for while an engine works."""
_REASON: dict[str | None, str] = {"502": "Bad Gateway", "504": "Gateway Time-out"}
_ABORTIVE = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to a port of loopback; `trouble` strikes calls that wait, once.

    502 and 504: the call that waits, or the next one, gets this answer; the engine works on.
    cut: it gets half of its answer.
    hold: nothing passes. reset: every connection is reset, and new ones too, until `heal`.
    gone: the same, without a heal that comes in time.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._trouble: Trouble | None = None
        self._open: list[_Connection] = []
        self._striking = threading.Lock()
        self._free = threading.Event()
        self._free.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """What a trainer is given."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def strike(self, trouble: Trouble) -> None:
        """Misbehave from now on."""
        self._trouble = trouble
        if trouble == "hold":
            self._free.clear()
        for connection in list(self._open):
            if trouble in ("reset", "gone"):
                connection.reset()
            elif connection.waits and trouble in _REASON:
                self.answered(connection)

    def heal(self) -> None:
        """Behave again."""
        self._trouble = None
        self._free.set()

    def close(self) -> None:
        """Take no more connections, and end those that are open."""
        self.heal()
        self._listener.close()
        for connection in list(self._open):
            connection.reset()

    def answered(self, connection: _Connection) -> None:
        """Answer in the engine's place, if that is the trouble; one call and no more."""
        with self._striking:
            status = self._trouble
            if status not in _REASON:
                return
            self._trouble = None
        connection.answer(status)

    def passing(self, connection: _Connection, data: bytes) -> bytes | None:
        """What of an engine's bytes is passed on; None where that is the last of it."""
        self._free.wait()
        if self._trouble == "cut" and connection.waits:
            self._trouble = None
            connection.cut(data)
            return None
        return data

    def asked(self, connection: _Connection) -> None:
        """A call that waits has been forwarded."""
        self._free.wait()
        self.answered(connection)

    def held(self) -> None:
        """Wait out a hold."""
        self._free.wait()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._trouble in ("reset", "gone"):
                    _reset(client)
                    continue
                try:
                    engine = socket.create_connection(("127.0.0.1", self._upstream), timeout=10)
                except OSError:
                    _reset(client)
                    continue
                engine.settimeout(None)
                self._open.append(connection := _Connection(self, client, engine))
                connection.pump()


class _Connection:
    """A client's connection and ours to the engine; two threads pump."""

    def __init__(self, proxy: Proxy, client: socket.socket, engine: socket.socket) -> None:
        self._proxy, self._client, self._engine = proxy, client, engine
        self.waits = False
        self._mute = False

    def pump(self) -> None:
        """Begin to forward, both ways."""
        for pump in (self._to_engine, self._to_client):
            threading.Thread(target=pump, daemon=True).start()

    def _to_engine(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._client.recv(1 << 16):
                self._proxy.held()
                if asks := WAITING.match(data):
                    self.waits = True  # before the engine can hear of it
                self._engine.sendall(data)
                if asks:
                    self._proxy.asked(self)
            if not self._mute:
                self._engine.shutdown(socket.SHUT_WR)

    def _to_client(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._engine.recv(1 << 16):
                if self._mute:
                    continue  # the engine works on, and nobody hears its answer
                passed = self._proxy.passing(self, data)
                if passed is None:
                    continue
                self._client.sendall(passed)
                self.waits = False
        for end in (self._client, self._engine):
            with contextlib.suppress(OSError):
                end.close()

    def answer(self, status: str | None) -> None:
        """Tell the client that the gateway gave up, and hang up on it."""
        self._mute = True
        body = f"<html><h1>{status} {_REASON[status]}</h1></html>".encode()
        head = f"HTTP/1.1 {status} {_REASON[status]}\r\nContent-Type: text/html\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            self._client.sendall(head.encode() + body)
            self._client.shutdown(socket.SHUT_WR)

    def cut(self, data: bytes) -> None:
        """Pass on half of an answer, and hang up."""
        self._mute = True
        with contextlib.suppress(OSError):
            self._client.sendall(data[: len(data) // 2])
            self._client.shutdown(socket.SHUT_WR)
            time.sleep(0.05)
            self._client.close()

    def reset(self) -> None:
        """As a broken network: no goodbye."""
        self._mute = True
        _reset(self._client)


def _reset(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        client.shutdown(socket.SHUT_RDWR)  # or a thread that reads it would keep it open
        client.close()
