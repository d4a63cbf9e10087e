"""The in-memory engine as a server: a process of its own, HTTP, NIXL, and answers that are right.

Receivers, admin routes and transport are the product's; the engine around them is a queue over a
Hugging Face model.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import prometheus_client
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors.torch import load_file
from starlette.types import ASGIApp, Receive, Scope, Send

import engine_plugins
from engine_plugins.admin.app import create_admin_app
from engine_plugins.admin.background import going_on
from engine_plugins.admin.engine_control import EngineInfo
from engine_plugins.admin.error_responses import problem_from
from engine_plugins.admin.mount import AdminMount
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, ensure_runtime_dir, shared_state
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from engine_plugins.engine_rank import TaggedTensors, make_rank_service
from engine_plugins.errors import EnginePluginError
from engine_plugins.prefill_gate.entry import GateBoard, refusal_at_entry
from engine_plugins.prefill_gate.metrics import tell_gate_metrics
from engine_plugins.settings import Settings
from engine_plugins.sleep.host_memory import HostMemory
from engine_plugins.sleep.rank_memory import RankMemory
from engine_plugins.weights.boxes.model_facts import model_facts
from tests.support import generating_engine
from tests.support.engine_server import (
    EngineServer,
    StreamEvent,
    answering,
    free_port,
    server_environment,
    server_events,
)
from tests.support.forked_process import ForkedProcess
from tests.support.generating_engine import SMALLEST_CHUNK, TICK_S, GeneratingEngine
from tests.support.hf_forward import HfForward
from tests.support.in_memory_model import InMemoryInstaller, LoadableModel
from tests.support.sharded_model import ShardedModel, gathered
from tests.support.stepping import watch_installs

__all__ = ["InMemoryServer", "in_memory_server"]

CACHE_BYTES = 64 << 20


class InMemoryServer(EngineServer):
    """A running in-memory engine."""

    kind = "in_memory"

    def complete(self, prompt: Sequence[int], tokens: int = 16) -> httpx.Response:
        return self.http.post("/generate", json={"prompt": list(prompt), "max_tokens": tokens})

    def tokens_of(self, response: httpx.Response) -> list[int]:
        return list(response.json()["token_ids"])

    def oversized(self, *, stream: bool = False) -> httpx.Response:
        """A prompt over what an idle engine runs without room; it is computed whole or not."""
        prompt = list(range(1, SMALLEST_CHUNK + 2))
        body = {"prompt": prompt, "max_tokens": 1, "stream": stream}
        return self.http.post("/generate", json=body)

    def finish_reason(self, response: httpx.Response) -> str:
        return "error" if response.is_error else str(response.json()["finish_reason"])

    def stream(self, prompt: Sequence[int], tokens: int) -> Iterator[StreamEvent]:
        body = {"prompt": list(prompt), "max_tokens": tokens, "stream": True}
        for event in server_events(self.http, "/generate", body):
            yield StreamEvent(**event)


@contextmanager
def in_memory_server(
    model: Path,
    log: Path,
    *,
    tensor_parallel: int = 1,
    api_servers: int = 1,
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
) -> Iterator[InMemoryServer]:
    """A server for as long as a context lasts."""
    port = free_port()
    process = ForkedProcess(
        _serve,
        (model, port, tensor_parallel, api_servers, api_key),
        log=log,
        environment=server_environment(log, environment or {}),
    )
    with answering(
        InMemoryServer, process, port=port, log=log, api_servers=1, api_key=api_key
    ) as server:
        yield server


class ServedEngine(GeneratingEngine):
    """One process that holds every rank's share of a model and generates with the whole of it."""

    def __init__(self, folder: Path, tensor_parallel: int, shared: SharedState) -> None:
        memories = [RankMemory(tp_rank, None) for tp_rank in range(tensor_parallel)]
        for memory in memories:
            memory.take_baseline()
        checkpoint = load_file(folder / "model.safetensors")
        self._forward = HfForward(folder)
        self._folder = folder
        self._names = list(checkpoint)
        self._models = [
            ShardedModel(
                {name: tensor.shape for name, tensor in checkpoint.items()},
                tied=bool(self._forward.config.tie_word_embeddings),
                tp_rank=tp_rank,
                tp_size=tensor_parallel,
            )
            for tp_rank in range(tensor_parallel)
        ]
        for model in self._models:
            model.load_weights(checkpoint.items())
        self._installers = [InMemoryInstaller(model) for model in self._models]
        self._take_weights()
        services = []
        for memory, installer in zip(memories, self._installers, strict=True):
            watch_installs(installer, memory.tp_rank)
            tensors = _tensors(installer.model)
            services.append(
                make_rank_service(
                    installer,
                    memory,
                    tp_size=tensor_parallel,
                    settings=Settings.load(),
                    runtime_dir=shared.runtime_dir,
                    backend=HostMemory(tensors),
                    tensors=tensors,
                )
            )
        super().__init__(
            services,
            generation=lambda: shared.read().kv_generation,
            board=GateBoard(Path(os.environ[RUNTIME_DIR])),
        )

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            kind="in_memory",
            version=engine_plugins.__version__,
            plugin_version=engine_plugins.__version__,
            model=str(self._folder),
            tensor_parallel_size=len(self._models),
            pipeline_parallel_size=1,
            model_facts=model_facts(self._forward.config),
        )

    def forward(self, tokens: Sequence[int], kv: Sequence[Any]) -> tuple[list[Any], int]:
        assert not any(installer.loading for installer in self._installers), "half-new weights"
        return self._forward(tokens, kv)

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        answers = await super().call_workers(call, arguments)
        if call == "finish":
            self._take_weights()
        return answers

    def _take_weights(self) -> None:
        """Generate with what the ranks hold now."""
        self._forward.load(gathered(self._models, self._names))


def _tensors(model: LoadableModel) -> TaggedTensors:
    """A rank's parameters, and pages that stand for its KV cache."""
    cache = torch.ones(CACHE_BYTES, dtype=torch.uint8)
    return {
        "weights": lambda: (parameter for _, parameter in model.named_parameters()),
        "kv_cache": lambda: [cache],
    }


class _Api:
    """One API process: the engine's own routes and ours."""

    def __init__(self, engine: ServedEngine, shared: SharedState, api_key: str | None) -> None:
        self._engine, self._shared, self._api_key = engine, shared, api_key
        settings = Settings.load()
        runtime_dir = Path(os.environ[RUNTIME_DIR])
        self._board = GateBoard(runtime_dir)
        tell_gate_metrics(runtime_dir)
        self.app = FastAPI()
        self.app.add_api_route("/health", self._health, methods=["GET"])
        self.app.add_api_route("/generate", self._generate, methods=["POST"])
        self.app.add_api_route("/metrics", self._metrics, methods=["GET"])
        self.service = AdminService(engine, shared, settings)
        admin = create_admin_app(self.service, settings)
        self.app.router.routes.append(AdminMount(admin))

    async def _health(self) -> Response:
        return Response()

    async def _generate(self, request: Request) -> Response:
        if self._api_key and request.headers.get("authorization") != f"Bearer {self._api_key}":
            raise HTTPException(401, "no key, or not this engine's")
        self._refuse_while_fenced()
        body = await request.json()
        refused = self._refusal(len(body["prompt"]))
        if refused is not None:
            return problem_from(refused, state=None)
        held = self._engine.submit(
            *body["prompt"], max_tokens=body["max_tokens"], refusable=not body.get("stream")
        )
        if body.get("stream"):
            return StreamingResponse(self._events(held), media_type="text/event-stream")
        await held.ended.wait()
        if held.refusal is not None:
            return problem_from(held.refusal, state=None)
        if held.finish_reason == "error":
            self._refuse_while_fenced()
        return JSONResponse({"token_ids": held.tokens, "finish_reason": held.finish_reason})

    async def _metrics(self) -> Response:
        return Response(prometheus_client.generate_latest(), media_type="text/plain")

    def _refusal(self, prompt_tokens: int) -> EnginePluginError | None:
        status = self._board.read()
        if status is None:
            return None
        return refusal_at_entry(status.limits, prompt_tokens=prompt_tokens, prompt_logprobs=False)

    def _refuse_while_fenced(self) -> None:
        refused = refusal(self._shared.read())
        if refused is not None:
            raise HTTPException(503, refused)

    async def _events(self, held: generating_engine.Request) -> AsyncIterator[str]:
        """What is new, a few times a second, until the request has ended."""
        sent = 0
        while True:
            ended, ids = held.finish_reason, held.tokens[sent:]
            sent += len(ids)
            if ids or ended:
                error = refusal(self._shared.read()) if ended == "error" else None
                event = StreamEvent(token_ids=ids, finish_reason=ended, error=error)
                yield f"data: {json.dumps(msgspec.to_builtins(event))}\n\n"
            if ended:
                return
            await asyncio.sleep(TICK_S)


class _ByTurns:
    """Gives every request to the next of several API processes."""

    def __init__(self, apps: Sequence[ASGIApp]) -> None:
        self._next = itertools.cycle(apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await next(self._next)(scope, receive, send)


def _serve(
    model: Path, port: int, tensor_parallel: int, api_servers: int, api_key: str | None
) -> None:
    """Serve until a signal comes; all API servers are in the one process."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    ensure_runtime_dir()
    shared = shared_state()
    engine = ServedEngine(model, tensor_parallel, shared)
    apis = [_Api(engine, shared, api_key) for _ in range(api_servers)]

    @asynccontextmanager
    async def generating(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engine.running())
            for api in apis:
                await stack.enter_async_context(going_on(api.service.watcher.run()))
            yield

    application = FastAPI(lifespan=generating)
    application.mount("/", _ByTurns([api.app for api in apis]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    uvicorn.run(application, host="127.0.0.1", port=port, access_log=False)
