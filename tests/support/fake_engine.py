"""An engine without a model: a real HTTP server that keeps the admin contract's promises.

It checks tokens and manifests, makes plans from the sources that it holds, refuses stale
versions and unknown ids, and (within one process) pulls the bytes for real, or has them pushed.
"""

from __future__ import annotations

import gzip
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from engine_plugins.admin_answers import EngineOffer
from engine_plugins.errors import EnginePluginError
from engine_plugins.weights.contract.manifest import (
    MSGPACK,
    SourceManifest,
    decode_manifest,
    numbers,
)
from engine_plugins.weights.contract.manifest_batch import decode_batch, is_gzip
from engine_plugins.weights.contract.report import Outcome, Phases, PlanSummary, UpdateReport
from engine_plugins.weights.contract.version_word import new_word
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.certificates import Identity
from tests.support.pull import pull
from tests.support.push_target import PushTarget

__all__ = ["TOKEN", "FakeEngine", "served"]

TOKEN = "s3cret"


class Refused(Exception):
    """Becomes problem+json."""

    def __init__(
        self, status: int, code: str, detail: str, *, state: str = "serving", **headers: str
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.state, self.headers = state, {k.replace("_", "-"): v for k, v in headers.items()}


class FakeEngine:
    """State and behaviour of one fake engine; tests read and bend its attributes."""

    def __init__(self, *, pulls: bool = True) -> None:
        self.url = ""
        self.pulls = pulls
        self.weights: dict[str, torch.Tensor] = {}
        self.version: int | None = None
        self.request_id: str | None = None
        self.paused = False
        self.offered: WeightSource | None = None
        self.offers = 0
        self.sources: dict[str, SourceManifest] = {}
        self.plans: dict[str, list[str]] = {}
        self.models: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.most_in_batch = 4096
        self.encodings: list[str | None] = []
        self.answered: dict[str, UpdateReport] = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        self.aborts: list[dict[str, Any]] = []
        self.pushed: dict[str, PushTarget] = {}
        self.refuse: dict[str, Refused] = {}
        self.wants: dict[str, str] = {}
        self.restart_after: set[int] = set()
        self.update_s = 0.0
        self.prepare_s = 0.0
        self.after_update: Callable[[], object] = lambda: None
        self.progress: dict[str, Any] | None = None
        self.more_state: dict[str, Any] = {}
        self.polls = 0

    def reset(self) -> None:
        """Become as if made anew, behind the same url."""
        self.restart()
        vars(self).update(vars(FakeEngine()) | {"url": self.url})

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self.version = None
        if self.offered is not None:
            self.offered.close()
            self.offered = None
        for target in self.pushed.values():
            target.close()
        for kept in (self.sources, self.plans, self.answered, self.weights):
            kept.clear()
        self.prepared.clear()
        self.pushed.clear()

    def put_source(self, body: bytes, content_type: str) -> dict[str, Any]:
        manifest = decode_manifest(body, content_type=content_type, max_entries=10_000)
        source_id = f"src-{uuid.uuid4().hex[:8]}"
        self.sources[source_id] = manifest
        return {"source_id": source_id}

    def put_sources(self, elements: list[bytes]) -> dict[str, Any]:
        if len(elements) > self.most_in_batch:
            raise Refused(413, "body_too_large", "the body is over the limit")
        self.batches.append(len(elements))
        plain = [gzip.decompress(each) if is_gzip(each) else each for each in elements]
        return {"source_ids": [self.put_source(each, MSGPACK)["source_id"] for each in plain]}

    def connect(self, body: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in body["source_ids"] if name not in self.sources]
        if unknown:
            raise Refused(404, "unknown_id", f"no source {unknown}")
        self.models.append(body["model"])
        wanted = self._wanted(body["source_ids"])
        if wanted and not body.get("tell_dtypes"):
            raise Refused(422, "weight_mismatch", f"other dtypes are wanted: {wanted}")
        plan_id = "" if wanted else f"plan-{uuid.uuid4().hex[:8]}"
        self.plans[plan_id] = body["source_ids"]
        nbytes = self._nbytes(plan_id)
        if wanted:
            del self.plans[plan_id]
        if body["direction"] == "push" and not wanted:
            manifests = [self.sources[name] for name in body["source_ids"]]
            self.pushed[plan_id] = PushTarget(manifests)
        summary = PlanSummary(
            plan_id=plan_id,
            direction=body["direction"],
            bytes_needed=nbytes,
            bytes_to_move=nbytes,
            operations=3,
            direct_bytes=0,
            staged_bytes=0,
            loader_bytes=nbytes,
            connect_s=0.0,
            plan_s=0.0,
            ranks=[],
            destinations=self.pushed[plan_id].destinations() if plan_id in self.pushed else [],
            wanted=wanted,
        )
        plain: dict[str, Any] = msgspec.to_builtins(summary)
        return {**plain, "a_field_of_a_later_release": 1}

    def _wanted(self, source_ids: list[str]) -> dict[str, list[str]]:
        wanted: dict[str, list[str]] = {}
        for source_id in source_ids:
            tensors = self.sources[source_id].tensors
            for name, dtype in zip(tensors.names, tensors.dtypes, strict=True):
                want = self.wants.get(name, dtype)
                if want != dtype and name not in wanted.get(want, ()):
                    wanted.setdefault(want, []).append(name)
        return wanted

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        known = self.answered.get(body["request_id"])
        if known is None:
            known = self._install(body)
            self.answered[body["request_id"]] = known
        if body["version"] in self.restart_after:
            self.restart_after.discard(body["version"])
            self.restart()
        plain: dict[str, Any] = msgspec.to_builtins(known)
        return plain

    def prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        """Fetch nothing yet: what the engine would take is taken at the commit."""
        if body["request_id"] not in self.prepared:
            self._refuse_unfit(body)
            nbytes = self._nbytes(body["plan_id"])
            self.progress = {"phase": "pull", "bytes_done": 0, "bytes_total": nbytes}
            time.sleep(self.prepare_s)
            self.prepared[body["request_id"]] = body
            self.progress = {"phase": "prepared", "bytes_done": nbytes, "bytes_total": nbytes}
        plain: dict[str, Any] = msgspec.to_builtins(self._report(body, "prepared"))
        return plain

    def commit(self, body: dict[str, Any]) -> dict[str, Any]:
        known = self.answered.get(body["request_id"])
        if known is None:
            known = self._install(self._taken(body))
            self.answered[body["request_id"]] = known
        plain: dict[str, Any] = msgspec.to_builtins(known)
        return plain

    def abort(self, body: dict[str, Any]) -> dict[str, Any]:
        self.aborts.append(body)
        self.progress = None
        plain: dict[str, Any] = msgspec.to_builtins(self._report(self._taken(body), "aborted"))
        return plain

    def _taken(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["request_id"] not in self.prepared:
            raise Refused(404, "unknown_id", "nothing is prepared")
        return self.prepared.pop(body["request_id"])

    def manifest(self) -> dict[str, Any]:
        """The weights as they were pulled, in a manifest that stays the same."""
        self.offers += 1
        if self.version is None:
            raise Refused(409, "illegal_state", "nothing was installed")
        if self.offered is None:
            boxes = hf_boxes(self.weights)
            self.offered = WeightSource(boxes, InMemoryTransport(f"fake-{uuid.uuid4().hex[:8]}"))
        word = new_word()
        self.offered.offer(word)
        offer = EngineOffer(
            source_word=word,
            version=self.version,
            request_id=self.request_id,
            manifests=[self.offered.manifest_bytes],
        )
        plain: dict[str, Any] = msgspec.to_builtins(offer)
        return plain

    def state(self) -> dict[str, Any]:
        self.polls += 1
        return {
            "engine": {"kind": "fake"},
            "state": "updating" if self.progress else "paused" if self.paused else "serving",
            "since": 0.0,
            "weights": {
                "version": self.version,
                "request_id": self.request_id,
                "installed_at": 0.0,
            },
            "pause": {"mode": "keep", "until": None} if self.paused else None,
            "fence": None,
            "requests": {"running": 0, "waiting": 0},
            "workers": [],
            "update": self.progress,
            **self.more_state,
        }

    def _refuse_unfit(self, body: dict[str, Any]) -> None:
        if body["plan_id"] not in self.plans:
            raise Refused(404, "unknown_id", f"no plan {body['plan_id']}")
        if self.version is not None and body["version"] <= self.version and not body["force"]:
            raise Refused(409, "stale_version", f"version {self.version} is installed")

    def _install(self, body: dict[str, Any]) -> UpdateReport:
        self._refuse_unfit(body)
        self.updates.append(body)
        nbytes = self._nbytes(body["plan_id"])
        self.progress = {"phase": "pull", "bytes_done": nbytes // 2, "bytes_total": nbytes}
        time.sleep(self.update_s)
        target = self.pushed.get(body["plan_id"])
        if target is not None:
            self._take(target.tensors())
        for source in self.plans[body["plan_id"]] if self.pulls and target is None else []:
            self._take(pull(self.sources[source]))
        self.progress = None
        self.version, self.request_id = body["version"], body["request_id"]
        if body["resume"] is not None:
            self.paused = not body["resume"]
        self.after_update()
        return self._report(body, "installed")

    def _report(self, body: dict[str, Any], outcome: Outcome) -> UpdateReport:
        nbytes = self._nbytes(body["plan_id"])
        return UpdateReport(
            version=body["version"],
            request_id=body["request_id"],
            plan_id=body["plan_id"],
            outcome=outcome,
            mode="in_place",
            bytes_moved=nbytes,
            bytes_needed=nbytes,
            gbps=1.0,
            seconds=self.update_s,
            paused_s=0.0,
            phases=Phases(),
            peak_extra_bytes=0,
            ranks=[],
            finished_at=0.0,
        )

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Into the memory that was there before: peers have its addresses."""
        for name, tensor in tensors.items():
            self.weights.setdefault(name, torch.empty_like(tensor)).copy_(tensor)

    def _nbytes(self, plan_id: str) -> int:
        return sum(
            int(numbers(self.sources[name].regions.nbytes).sum()) for name in self.plans[plan_id]
        )


def application(engine: FakeEngine) -> FastAPI:
    app = FastAPI()

    calls = {
        "/weights/update": engine.update,
        "/weights/prepare": engine.prepare,
        "/weights/commit": engine.commit,
        "/weights/abort": engine.abort,
    }

    async def guarded(request: Request) -> JSONResponse:
        path = request.url.path.removeprefix("/admin/v1")
        try:
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "unauthorized", "no token, or not one of this server's")
            if path in engine.refuse:
                raise engine.refuse[path]
            return JSONResponse(await answer(path, request))
        except Refused as error:
            return _problem(error)
        except EnginePluginError as error:
            return _problem(Refused(422, error.code, error.message))

    async def answer(path: str, request: Request) -> dict[str, Any]:
        body = await request.body()
        if path == "/weights/sources":
            engine.encodings.append(request.headers.get("content-encoding"))
            if engine.encodings[-1] == "gzip":
                body = gzip.decompress(body)
            return engine.put_source(body, request.headers["content-type"])
        if path == "/weights/sources/batch":
            return engine.put_sources(decode_batch(body))
        if path == "/weights/connect":
            return engine.connect(msgspec.json.decode(body))
        if path in calls:
            from starlette.concurrency import run_in_threadpool

            return await run_in_threadpool(calls[path], msgspec.json.decode(body))
        if path == "/flush":
            return {"flushed": [name for name, asked in msgspec.json.decode(body).items() if asked]}
        if path == "/weights/manifest":
            return engine.manifest()
        if path == "/resume":
            engine.paused = False
        if path == "/weights":
            history = [msgspec.to_builtins(report) for report in engine.answered.values()]
            return {"version": engine.version, "history": history, "plans": []}
        return engine.state()

    for path in ("/state", "/weights", "/weights/manifest"):
        app.add_api_route("/admin/v1" + path, guarded, methods=["GET"])
    for path in ("/pause", "/resume", "/flush", "/weights/sources", "/weights/connect"):
        app.add_api_route("/admin/v1" + path, guarded, methods=["POST"])
    app.add_api_route("/admin/v1/weights/sources/batch", guarded, methods=["POST"])
    for path in calls:
        app.add_api_route("/admin/v1" + path, guarded, methods=["POST"])
    return app


def _problem(refused: Refused) -> JSONResponse:
    told = {
        "type": f"urn:engine-plugins:{refused.code}",
        "title": "no",
        "status": refused.status,
        "detail": refused.detail,
        "code": refused.code,
        "state": refused.state,
        "remedy": f"mend {refused.code}",
    }
    return JSONResponse(
        told,
        status_code=refused.status,
        headers=refused.headers,
        media_type="application/problem+json",
    )


@contextmanager
def served(
    engine: FakeEngine, identity: Identity | None = None, *, believes: Path | None = None
) -> Iterator[FakeEngine]:
    """Serve the engine on a free loopback port while the block runs.

    With an identity it speaks TLS, and where it `believes` an authority, it demands a certificate
    of that one from its callers.
    """
    config = uvicorn.Config(
        application(engine),
        host="127.0.0.1",
        port=0,
        log_level="error",
        ws="none",
        lifespan="off",
        ssl_certfile=None if identity is None else identity.certificate,
        ssl_keyfile=None if identity is None else identity.key,
        ssl_ca_certs=None if believes is None else str(believes),
        ssl_cert_reqs=ssl.CERT_NONE if believes is None else ssl.CERT_REQUIRED,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the fake engine did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    engine.url = f"{'http' if identity is None else 'https'}://127.0.0.1:{port}"
    try:
        yield engine
    finally:
        server.should_exit = True
        thread.join(timeout=10)
