"""The proxy of `make chaos-update` does to a call what broken gateways and networks do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.chaos_update.proxy import Proxy, Trouble

ANSWER = b"installed" * 100


class _Engine(ThreadingHTTPServer):
    """Answers a waiting call when it is let, and everything else at once."""

    def __init__(self) -> None:
        self.let, self.heard, self.done = threading.Event(), threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Engine

    def do_GET(self) -> None:
        self._say(b"state")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.set()
        self.server.let.wait(10)
        self.server.done.set()
        self._say(ANSWER)

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test says what was wrong."""


@pytest.fixture
def engine() -> Iterator[_Engine]:
    """An engine in a thread."""
    with _Engine() as engine:
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        yield engine
        engine.let.set()
        engine.shutdown()
        thread.join()


@pytest.fixture
def proxy(engine: _Engine) -> Iterator[Proxy]:
    """The proxy in front of it."""
    proxy = Proxy(engine.server_address[1])
    yield proxy
    proxy.close()


def _update(proxy: Proxy) -> httpx.Response:
    return httpx.post(proxy.url + "/admin/v1/weights/update", json={"version": 1}, timeout=10)


def _get(proxy: Proxy) -> httpx.Response:
    return httpx.get(proxy.url + "/admin/v1/state", timeout=2)


@pytest.mark.parametrize("status", ["502", "504"])
def test_a_gateway_that_gives_up(engine: _Engine, proxy: Proxy, status: Trouble) -> None:
    """The call that waits gets its status; the engine works on, and other calls pass."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_update, proxy)
        assert engine.heard.wait(10)
        proxy.strike(status)
        assert waiting.result().status_code == int(status)
    assert _get(proxy).content == b"state"
    engine.let.set()
    assert engine.done.wait(10)
    assert _update(proxy).content == ANSWER, "once, and no more"


def test_a_gateway_that_gives_up_the_next_call(engine: _Engine, proxy: Proxy) -> None:
    """Where none waits yet; the engine hears of it all the same."""
    proxy.strike("504")
    assert _get(proxy).content == b"state"
    assert _update(proxy).status_code == 504
    assert engine.heard.wait(10)


def test_an_answer_that_is_cut(engine: _Engine, proxy: Proxy) -> None:
    """Half of it comes."""
    proxy.strike("cut")
    engine.let.set()
    with pytest.raises(httpx.RemoteProtocolError):
        _update(proxy)
    assert _update(proxy).content == ANSWER


def test_a_network_that_is_gone(engine: _Engine, proxy: Proxy) -> None:
    """Connections break, new ones too, until it is mended."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_update, proxy)
        assert engine.heard.wait(10)
        proxy.strike("reset")
        with pytest.raises(httpx.TransportError):
            waiting.result()
    with pytest.raises(httpx.TransportError):
        _get(proxy)
    proxy.heal()
    assert _get(proxy).content == b"state"


def test_a_network_that_holds(engine: _Engine, proxy: Proxy) -> None:
    """Nothing passes, and nothing is lost."""
    proxy.strike("hold")
    with ThreadPoolExecutor() as pool:
        held = pool.submit(_update, proxy)
        assert not engine.heard.wait(0.3)
        engine.let.set()
        proxy.heal()
        assert held.result().content == ANSWER
