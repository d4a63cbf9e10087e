"""The admin contract over the in-memory engine, as one API process of a server holds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from engine_plugins.admin.app import create_admin_app
from engine_plugins.admin.background import going_on
from engine_plugins.admin.mount import PREFIX, AdminMount
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.settings import Settings
from engine_plugins.weights.contract.manifest import SourceManifest, encode_manifest
from tests.support.documented import check_answer_async
from tests.support.in_memory_engine import InMemoryEngine

__all__ = ["MSGPACK", "TOKEN", "AdminServer"]

TOKEN = "s3cret"
MSGPACK = {"content-type": "application/msgpack"}


class AdminServer:
    """One API process.

    Args:
        runtime_dir: shared with the other API processes of the engine.
        engine: shared with them too; a new one if there is none yet.
        settings: as for the service; the token is added.
        direct_landing: as for the engine's receivers.
        root_path: what a proxy in front of the server says the server is under.
    """

    def __init__(
        self,
        runtime_dir: Path,
        *,
        engine: InMemoryEngine | None = None,
        tp_size: int = 1,
        direct_landing: bool = False,
        root_path: str = "",
        settings: Settings | None = None,
    ) -> None:
        self.shared = SharedState(runtime_dir)
        self.engine = engine or InMemoryEngine(
            tp_size=tp_size,
            generation=lambda: self.shared.read().kv_generation,
            direct_landing=direct_landing,
        )
        self.settings = settings or Settings(admin_token=TOKEN)
        self.service = AdminService(self.engine, self.shared, self.settings)
        self.app = FastAPI()
        self.app.root_path = root_path
        admin = create_admin_app(self.service, self.settings)
        self.app.router.routes.append(AdminMount(admin))
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url=f"http://engine{PREFIX}",
            headers={"authorization": f"Bearer {TOKEN}"},
            event_hooks={"response": [check_answer_async]},
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AdminServer]:
        """Serve, and generate in the background."""
        async with self.engine.running(), self.http, going_on(self.service.watcher.run()):
            yield self

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(path)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def state(self) -> dict[str, Any]:
        answer = await self.get("/state")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def publish(self, manifest: SourceManifest) -> httpx.Response:
        return await self.http.post(
            "/weights/sources", content=encode_manifest(manifest), headers=MSGPACK
        )

    async def connect(self, manifests: Iterable[SourceManifest], **more: Any) -> httpx.Response:
        """Publish every manifest and connect to all of them."""
        ids = []
        for manifest in manifests:
            published = await self.publish(manifest)
            assert published.status_code == 200, published.text
            ids.append(published.json()["source_id"])
        return await self.post("/weights/connect", source_ids=ids, **more)

    async def plan(self, *manifests: SourceManifest) -> str:
        connected = await self.connect(manifests)
        assert connected.status_code == 200, connected.text
        return str(connected.json()["plan_id"])

    async def until(self, state: str, *, phase: str | None = None, within_s: float = 10) -> None:
        """Wait until the engine is in a state (and an update in a phase)."""
        give_up = time.monotonic() + within_s
        while True:
            now = self.shared.read()
            reached = phase is None or (now.update is not None and now.update.phase == phase)
            if now.state == state and reached:
                return
            assert time.monotonic() < give_up, f"still {now}"
            await asyncio.sleep(0.005)
