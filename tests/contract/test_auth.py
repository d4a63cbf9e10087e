"""Tokens and scopes of a running server: who may call what, before a body is read."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator

import httpx
import pytest

from engine_plugins.admin.routes import SCOPES
from tests.support.configurations import DENSE, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.problems import problem
from tests.support.served import Served

pytestmark = on(DENSE)

ROUTES = sorted(SCOPES)
STRANGERS: tuple[dict[str, str], ...] = (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": TOKEN},
)


@pytest.fixture
def tokens(served: Served) -> Iterator[Served]:
    """The server, whose token file is as it was once the test is over."""
    yield served
    served.write_tokens("read", "control", "weights")
    assert served.server.state()["state"] == "serving"


def _call(
    server: EngineServer, method: str, path: str, token: str, body: bytes = b"{garbage"
) -> httpx.Response:
    """Without a connection that another API process might keep."""
    return httpx.request(
        method,
        f"{server.url}/admin/v1{path}",
        headers={"Authorization": f"Bearer {token}"},
        content=body,
    )


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_stranger_is_401_before_any_of_a_body_is_read(
    server: EngineServer, method: str, path: str
) -> None:
    """100 MB are announced and not a byte of them sent: the answer is there all the same."""
    for headers in STRANGERS:
        link = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        link.request(method, f"/admin/v1{path}", headers={**headers, "Content-Length": "104857600"})
        answer = link.getresponse()
        told = json.loads(answer.read())
        link.close()
        assert (answer.status, told["code"]) == (401, "unauthorized")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_garbage_of_a_stranger_is_401_and_not_400(
    server: EngineServer, method: str, path: str
) -> None:
    """Nobody learns what a route takes without a token."""
    for body in (b"{garbage", b"\xff" * 5_000_000):
        problem(_call(server, method, path, "wrong", body), 401, "unauthorized")


def test_a_token_opens_the_routes_of_its_scopes(tokens: Served) -> None:
    """403 names the scope that is missing; what is allowed meets the next check."""
    tokens.write_tokens(more="read r\ncontrol c\nweights w\nread both\nweights both\n")
    granted = {"r": {"read"}, "c": {"control"}, "w": {"weights"}, "both": {"read", "weights"}}
    for token, scopes in granted.items():
        for (method, path), scope in SCOPES.items():
            answer = _call(tokens.server, method, path, token)
            if scope in scopes:
                assert answer.status_code not in (401, 403), answer.text
            else:
                assert f"scope {scope}" in problem(answer, 403, "forbidden")


def test_a_token_file_counts_as_soon_as_it_changes(tokens: Served) -> None:
    """A new token works at once, and one that was taken out no longer does."""
    server = tokens.server
    tokens.write_tokens("read", more="read another\n")
    assert _call(server, "GET", "/state", "another").status_code == 200
    problem(server.admin.post("/resume"), 403, "forbidden")
    tokens.write_tokens("read", "control", "weights")
    problem(_call(server, "GET", "/state", "another"), 401, "unauthorized")
    assert server.admin.post("/resume").status_code == 200


def test_without_any_token_every_route_is_closed(tokens: Served) -> None:
    """503 names both settings; a line that makes no sense closes itself, and the log has it."""
    tokens.write_tokens()
    for method, path in ROUTES:
        answer = _call(tokens.server, method, path, TOKEN)
        problem(answer, 503, "not_configured")
        assert "ENGINE_PLUGINS_ADMIN_TOKEN " in answer.json()["remedy"]
        assert "ENGINE_PLUGINS_ADMIN_TOKEN_FILE" in answer.json()["remedy"]
    tokens.write_tokens("read", more="everything another-secret\n")
    assert _call(tokens.server, "GET", "/state", TOKEN).status_code == 200
    problem(_call(tokens.server, "GET", "/state", "another-secret"), 401, "unauthorized")
    log = tokens.server.log.read_text(errors="replace")
    assert f"{tokens.token_file}, line 2 is not `scope token`" in log
    assert "another-secret" not in log


def test_a_token_file_that_is_no_file_holds_nobody_up(tokens: Served) -> None:
    """A FIFO had stopped the whole API server: it is closed at once, and the engine serves on."""
    tokens.token_file.unlink()
    os.mkfifo(tokens.token_file)
    began = time.monotonic()
    problem(_call(tokens.server, "GET", "/state", TOKEN), 503, "not_configured")
    assert tokens.server.http.get("/health").status_code == 200
    assert time.monotonic() - began < 10


def test_our_token_and_the_engines_keys_do_not_open_each_others_doors(served: Served) -> None:
    """A key of the engine's is a stranger on our routes, and our token on those of the engine."""
    server = served.server
    assert server.greedy([5, 6, 7], 1), "the engine's own key opens the engine's own route"
    for key in served.engine.keyed.values():
        for method, path in ROUTES:
            problem(_call(server, method, path, key), 401, "unauthorized")
    own = dict(server.http.headers)
    for authorization in ({}, {"authorization": f"Bearer {TOKEN}"}):
        server.http.headers = httpx.Headers(authorization)
        refused = server.complete([5, 6, 7], 1)
        server.http.headers = httpx.Headers(own)
        assert refused.status_code in (401, 403), refused.text
