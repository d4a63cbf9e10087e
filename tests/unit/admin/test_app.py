"""The admin application inside another one, wherever that is served from."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI

from engine_plugins.admin.mount import PREFIX
from engine_plugins.settings import Settings
from tests.support.admin_server import TOKEN, AdminServer

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]


@pytest.mark.parametrize(
    ("root_path", "asked_at"),
    [
        ("", PREFIX),
        ("/models/tiny", PREFIX),
        ("/models/tiny", f"/models/tiny{PREFIX}"),
        (PREFIX, PREFIX + PREFIX),
        ("/models/tiny/", PREFIX),
        ("/models/tiny/", f"/models/tiny/{PREFIX}"),  # as uvicorn puts them together
    ],
)
async def test_routes_and_scopes_hold_under_any_root_path(
    make_server: MakeServer, tmp_path_factory: pytest.TempPathFactory, root_path: str, asked_at: str
) -> None:
    """Behind a proxy that strips the root path, and one that does not."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("read reader\n")
    server = make_server(
        root_path=root_path, settings=Settings(admin_token=TOKEN, admin_token_file=tokens)
    )
    async with server.running():
        server.http.base_url = httpx.URL(f"http://engine{asked_at}")
        assert (await server.get("/state")).json()["state"] == "serving"
        assert (await server.post("/pause")).json()["state"] == "paused"
        assert (await server.get("/nothing")).json()["code"] == "unknown_route"
        server.http.headers["authorization"] = "Bearer reader"
        assert (await server.get("/state")).status_code == 200
        assert (await server.post("/resume")).status_code == 403
        del server.http.headers["authorization"]
        assert (await server.get("/state")).status_code == 401
        assert (await server.get("/openapi.json")).status_code == 401


async def test_it_may_lie_two_mounts_deep(make_server: MakeServer) -> None:
    """The host application may itself be a part of another."""
    server = make_server()
    outer = FastAPI()
    outer.mount("/engine", server.app)
    async with server.running():
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=outer),
            base_url=f"http://x/engine{PREFIX}",
            headers={"authorization": f"Bearer {TOKEN}"},
        )
        async with client:
            assert (await client.get("/state")).status_code == 200
            assert (await client.post("/pause")).json()["state"] == "paused"


async def test_no_spelling_of_a_path_gets_past_its_scope(
    make_server: MakeServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A token that may only read pauses nothing, however the route is written."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("read reader\n")
    server = make_server(settings=Settings(admin_token_file=tokens))
    async with server.running():
        server.http.headers["authorization"] = "Bearer reader"
        for path in (
            "/pause/",
            "//pause",
            "/%70ause",
            "/pause%2F",
            "/pause;x",
            "/PAUSE",
            "/pause?",
        ):
            answer = await server.http.post(f"http://engine{PREFIX}{path}", follow_redirects=True)
            assert answer.status_code in (403, 404), path
        for method in ("HEAD", "OPTIONS", "PUT", "post"):
            answer = await server.http.request(method, "/pause")
            assert answer.status_code in (403, 405), method
        assert (await server.state())["state"] == "serving"
