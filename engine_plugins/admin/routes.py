"""The admin routes: HTTP in, a call of the service, HTTP out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine_plugins.admin.bodies import (
    AbortBody,
    CommitBody,
    ConnectBody,
    FlushBody,
    GateBody,
    PauseBody,
    SleepBody,
    UpdateBody,
    WakeBody,
)
from engine_plugins.admin.gzip_body import unpacked
from engine_plugins.admin.schemas import (
    STRUCT,
    Flushed,
    GateView,
    MemoryReport,
    SleepAnswer,
    SourceAccepted,
    SourcesAccepted,
    StateView,
    WeightsView,
)
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.strict_json import StrictRoute
from engine_plugins.admin.token_book import TokenScope
from engine_plugins.admin_answers import EngineOffer
from engine_plugins.weights.contract.manifest import JSON, MSGPACK, SourceManifest
from engine_plugins.weights.contract.manifest_batch import (
    MAX_BATCH,
    decode_batch,
    is_gzip,
    naming,
    refuse_other_than_msgpack,
)
from engine_plugins.weights.contract.report import PlanSummary, UpdateReport

__all__ = ["BATCH_PATH", "CONNECT_PATH", "SCOPES", "SOURCES_PATH", "admin_router"]

SOURCES_PATH = "/weights/sources"
BATCH_PATH = "/weights/sources/batch"
CONNECT_PATH = "/weights/connect"

SCOPES: dict[tuple[str, str], TokenScope] = {
    ("GET", "/state"): "read",
    ("POST", "/pause"): "control",
    ("POST", "/resume"): "control",
    ("POST", "/flush"): "control",
    ("POST", "/sleep"): "control",
    ("POST", "/wake"): "control",
    ("GET", "/memory"): "read",
    ("GET", "/prefill-gate"): "read",
    ("PATCH", "/prefill-gate"): "control",
    ("POST", "/prefill-gate/reset"): "control",
    ("POST", SOURCES_PATH): "weights",
    ("POST", BATCH_PATH): "weights",
    ("POST", CONNECT_PATH): "weights",
    ("GET", "/weights/manifest"): "weights",
    ("POST", "/weights/update"): "weights",
    ("POST", "/weights/prepare"): "weights",
    ("POST", "/weights/commit"): "weights",
    ("POST", "/weights/abort"): "weights",
    ("GET", "/weights"): "read",
}
"""The scope that each route needs."""

_PAUSE, _FLUSH, _SLEEP, _WAKE = PauseBody(), FlushBody(), SleepBody(), WakeBody()

_MANIFEST_BODY = {
    "parameters": [
        {
            "name": "Content-Encoding",
            "in": "header",
            "description": "gzip: the body is one gzip stream",
            "schema": {"type": "string", "enum": ["gzip"]},
        }
    ],
    "requestBody": {
        "required": True,
        "description": "Columns are bytes in msgpack, and base64 in JSON, which is for small ones.",
        "content": {
            MSGPACK: {"schema": {"type": "string", "format": "binary"}},
            JSON: {"schema": {STRUCT: SourceManifest.__name__}},
        },
    },
}

_BATCH_BODY = {
    "requestBody": {
        "required": True,
        "description": f"A msgpack array of 1 to {MAX_BATCH} byte strings, each a manifest as "
        "msgpack, or its gzip stream.",
        "content": {MSGPACK: {"schema": {"type": "string", "format": "binary"}}},
    },
}


def _told(
    operation_id: str, tag: str, *, answer: type[msgspec.Struct] | None = None
) -> dict[str, Any]:
    """What the document says of a route; `answer` is for those that FastAPI does not encode."""
    told: dict[str, Any] = {"operation_id": operation_id, "tags": [tag]}
    if answer is not None:
        schema = {STRUCT: answer.__name__}
        told["responses"] = {200: {"content": {JSON: {"schema": schema}}}}
    return told


def admin_router(service: AdminService, *, max_manifest_bytes: int) -> APIRouter:
    """The routes of this release over a service."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/state", **_told("getState", "engine"))
    async def state() -> StateView:
        """The engine as it is now; answers at once, however busy the engine is."""
        return await service.state()

    @router.post("/pause", **_told("pauseEngine", "engine"))
    async def pause(body: PauseBody = _PAUSE) -> StateView:
        """Stop generation: keep requests where they are, let them finish, or abort them."""
        return await service.pause(body)

    @router.post("/resume", **_told("resumeEngine", "engine"))
    async def resume() -> StateView:
        """Generate again."""
        return await service.resume()

    @router.post("/flush", **_told("flushCaches", "engine"))
    async def flush(body: FlushBody = _FLUSH) -> Flushed:
        """Empty caches; works while paused."""
        return Flushed(flushed=await service.flush(body))

    @router.post("/sleep", **_told("sleepEngine", "memory"))
    async def sleep(body: SleepBody = _SLEEP) -> SleepAnswer:
        """Give memory back, and say what is still resident; 507 where that is too much."""
        return await service.sleep(body)

    @router.post("/wake", **_told("wakeEngine", "memory"))
    async def wake(body: WakeBody = _WAKE) -> StateView:
        """Map memory again, and serve once all is here."""
        return await service.wake(body)

    @router.get("/memory", **_told("getMemory", "memory", answer=MemoryReport))
    async def memory() -> Response:
        """What is resident of every rank, where the figure comes from and how good it is."""
        return _json(await service.memory())

    @router.get("/prefill-gate", **_told("getPrefillGate", "prefill gate"))
    async def prefill_gate() -> GateView:
        """The gate's settings, calibration and counters."""
        return await service.prefill_gate()

    @router.patch("/prefill-gate", **_told("changePrefillGate", "prefill gate"))
    async def configure_prefill_gate(body: GateBody) -> GateView:
        """Change settings of the gate until the server ends; 422 changes nothing."""
        return await service.configure_prefill_gate(body)

    @router.post("/prefill-gate/reset", **_told("resetPrefillGate", "prefill gate"))
    async def reset_prefill_gate() -> GateView:
        """Forget measurements, kept ones too, who waits, and counters."""
        return await service.reset_prefill_gate()

    @router.post(SOURCES_PATH, openapi_extra=_MANIFEST_BODY, **_told("addSource", "weights"))
    async def sources(request: Request) -> SourceAccepted:
        """Offer one trainer process's weights: a manifest as msgpack or JSON, gzip allowed."""
        body = await request.body()
        if "gzip" in request.headers.get("content-encoding", ""):
            body = await asyncio.to_thread(unpacked, body, max_manifest_bytes)
        kind = request.headers.get("content-type", "")
        return SourceAccepted(source_id=await service.add_source(body, kind))

    @router.post(BATCH_PATH, openapi_extra=_BATCH_BODY, **_told("addSources", "weights"))
    async def sources_batch(request: Request) -> SourcesAccepted:
        """Offer many trainer processes' weights in one call; with an error some may be held."""
        refuse_other_than_msgpack(request.headers.get("content-type", ""))
        elements = await asyncio.to_thread(decode_batch, await request.body())
        source_ids = []
        for at, element in enumerate(elements, start=1):
            with naming(f"manifest {at} of {len(elements)}"):
                manifest = await asyncio.to_thread(_plain, element, max_manifest_bytes)
                source_ids.append(await service.add_source(manifest, MSGPACK))
        return SourcesAccepted(source_ids=source_ids)

    @router.post(CONNECT_PATH, **_told("connectSources", "weights", answer=PlanSummary))
    async def connect(body: ConnectBody, request: Request) -> Response:
        """Plan an update from sources, and meet them or say where they are to write."""
        plan = await service.connect(body, reached_at=_reached_at(request))
        return await asyncio.to_thread(_json, plan)  # of a push it may have many rows

    @router.get("/weights/manifest", **_told("getManifest", "weights", answer=EngineOffer))
    async def manifest(request: Request) -> Response:
        """Offer the version that serves to other engines: one manifest for each rank."""
        offer = await service.manifest(reached_at=_reached_at(request))
        return await asyncio.to_thread(_json, offer)

    @router.post("/weights/update", **_told("updateWeights", "weights", answer=UpdateReport))
    async def update(body: UpdateBody) -> Response:
        """Install new weights, as one transaction."""
        return _json(await service.update(body))

    @router.post("/weights/prepare", **_told("prepareWeights", "weights", answer=UpdateReport))
    async def prepare(body: UpdateBody) -> Response:
        """Have new weights here, and go on serving the old ones until the commit."""
        return _json(await service.prepare(body))

    @router.post("/weights/commit", **_told("commitWeights", "weights", answer=UpdateReport))
    async def commit(body: CommitBody) -> Response:
        """Install what was prepared under a request_id."""
        return _json(await service.commit(body))

    @router.post("/weights/abort", **_told("abortWeights", "weights", answer=UpdateReport))
    async def abort(body: AbortBody) -> Response:
        """Give up what was prepared under a request_id; the old weights serve on."""
        return _json(await service.abort(body))

    @router.get("/weights", **_told("getWeights", "weights"))
    async def weights() -> WeightsView:
        """The version that serves, past reports and known plans."""
        return await asyncio.to_thread(service.weights)

    return router


def _plain(element: bytes, limit_bytes: int) -> bytes:
    return unpacked(element, limit_bytes) if is_gzip(element) else element


def _reached_at(request: Request) -> str | None:
    """The address that the caller's connection ends at; None over a Unix socket."""
    server = request.scope.get("server")
    return str(server[0]) if server and server[1] is not None else None


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
