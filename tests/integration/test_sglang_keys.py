"""Our token and SGLang's two keys, on a server that has all three."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from sglang.srt.utils.auth import (
    AuthLevel,
    _get_auth_level_from_app_and_scope,
    auth_level,
    decide_request_auth,
)

from sglang_ext.closed_routes import INSTEAD
from sglang_ext.own_token import AdminRoutes
from tests.support.configurations import DENSE, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.engines import ADMIN_KEY, API_KEY, SGLANG, only

ORDINARY, CHIEF = API_KEY, ADMIN_KEY
GENERATION = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}


def on_a_server(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on a server with both of SGLang's keys and our token."""
    marked: Callable[..., None] = only(SGLANG)(on(DENSE)(test))
    return marked


def status(server: EngineServer, token: str | None, method: str, path: str, body: object) -> int:
    """What a route answers to somebody with a token."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.request(
        method, server.url + path, json=body, headers=headers, timeout=60
    ).status_code


@on_a_server
@pytest.mark.parametrize("token", [None, ORDINARY, CHIEF])
def test_no_key_of_sglangs_opens_our_routes(server: EngineServer, token: str | None) -> None:
    """Nor does it tell which of them exist."""
    for method, path in (
        ("GET", "/admin/v1/state"),
        ("POST", "/admin/v1/pause"),
        ("POST", "/admin/v1/weights/update"),
        ("GET", "/admin/v1/no-such-route"),
        ("OPTIONS", "/admin/v1/state"),
    ):
        assert status(server, token, method, path, {}) == 401
    assert server.state()["state"] == "serving"


@on_a_server
def test_our_token_opens_ours(server: EngineServer) -> None:
    """Although SGLang's own key check does not know it."""
    assert status(server, TOKEN, "GET", "/admin/v1/state", None) == 200
    assert status(server, TOKEN, "POST", "/admin/v1/pause", {"mode": "keep"}) == 200
    assert status(server, TOKEN, "POST", "/admin/v1/resume", {}) == 200
    assert status(server, TOKEN, "GET", "/admin/v1/no-such-route", None) == 404


@on_a_server
@pytest.mark.parametrize(
    ("method", "path", "body", "opened_by"),
    [
        ("POST", "/generate", GENERATION, ORDINARY),
        ("GET", "/get_model_info", None, ORDINARY),
        ("POST", "/flush_cache", {}, CHIEF),
        ("POST", "/pause_generation", {"mode": "no-such-mode"}, CHIEF),
    ],
)
def test_sglangs_routes_stay_as_protected_as_they_were(
    server: EngineServer, method: str, path: str, body: object, opened_by: str
) -> None:
    """Each by its own key and no other; a path that begins like ours is not ours."""
    for token in (None, TOKEN, ORDINARY, CHIEF):
        answered = status(server, token, method, path, body)
        assert (answered == 401) == (token != opened_by), (token, answered)
    for detour in (f"/admin/v1/..{path}", f"//admin/v1{path}", f"/admin/v1x{path}"):
        assert status(server, TOKEN, method, detour, body) in (401, 404)


@on_a_server
def test_a_closed_route_tells_of_itself_by_key_only(server: EngineServer) -> None:
    """Each of SGLang's routes that we close asks for the key that it asked for before."""
    for path in INSTEAD:
        for token in (None, TOKEN, ORDINARY):
            assert status(server, token, "POST", path, {}) == 401
        assert status(server, CHIEF, "POST", path, {}) == 409


@on_a_server
def test_the_name_of_sglangs_probe_opens_nothing(server: EngineServer) -> None:
    """A client that takes it is told so at once; the probe itself is answered."""
    for path in ("/generate", "/v1/completions"):
        named = {"rid": "HEALTH_CHECK_mine", "model": "m", "prompt": [1, 2], **GENERATION}
        refused = server.http.post(path, json=named)
        assert refused.status_code == 400, refused.text
        assert "HEALTH_CHECK" in refused.text
    assert server.http.get("/health_generate").status_code == 200


def scope(path: str) -> dict[str, object]:
    """A GET, as an ASGI server describes it."""
    return {"type": "http", "method": "GET", "path": path, "headers": [], "root_path": ""}


def may_pass(app: FastAPI, path: str, key: str) -> bool:
    """What SGLang's key check says to somebody with one of its keys."""
    return decide_request_auth(
        method="GET",
        path=path,
        authorization_header=f"Bearer {key}",
        api_key=ORDINARY,
        admin_api_key=CHIEF,
        auth_level=_get_auth_level_from_app_and_scope(app, scope(path)),
    ).allowed


def test_routes_are_registered_where_sglangs_key_check_sees_them() -> None:
    """Through a router they would count as ordinary ones: the ordinary key would pass."""

    @auth_level(AuthLevel.ADMIN_FORCE)
    async def guarded() -> None: ...

    trap = FastAPI()
    router = APIRouter()
    router.add_api_route("/admin/v1/state", guarded)
    trap.include_router(router)
    assert may_pass(trap, "/admin/v1/state", ORDINARY), "the trap is gone: simplify admin_mount"

    ours = FastAPI()
    AdminRoutes(FastAPI()).register(ours)
    for path in ("/admin/v1/state", "/admin/v1/weights/update"):
        assert not may_pass(ours, path, ORDINARY)
        assert may_pass(ours, path, CHIEF)
