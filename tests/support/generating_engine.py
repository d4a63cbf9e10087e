"""The queue and the scheduler of an engine within one process; what a token is, others say.

It keeps the promises of `EngineControl`: requests are held, drained or ended by a pause, prompts
share KV under the same cache key, and workers answer calls while nothing is generated.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from engine_plugins.admin.engine_control import EngineInfo, PauseMode, RequestCounts
from engine_plugins.errors import EnginePluginError
from engine_plugins.prefill_gate.engine_gate import EngineGate, make_engine_gate
from engine_plugins.prefill_gate.entry import EntryKind, GateBoard
from engine_plugins.prefill_gate.model_memory import ModelMemory, ModelSizes
from engine_plugins.prefill_gate.rank_meter import OwnRank, RankMeter
from engine_plugins.prefill_gate.step_memory import HostStepMemory
from engine_plugins.prefill_gate.step_shape import Candidate, StepShape
from engine_plugins.settings import Settings
from engine_plugins.weights.receiving.worker_messages import answer_call
from engine_plugins.weights.receiving.worker_service import WorkerService

__all__ = ["SMALLEST_CHUNK", "TICK_S", "GeneratingEngine", "Request"]

TICK_S = 0.002
ENDLESS = 1 << 30
SMALLEST_CHUNK = 16
"""Tokens of the largest prompt that an idle engine runs whatever the gate predicts."""


@dataclass(eq=False, kw_only=True)
class Request:
    """A request in the queue or behind it."""

    prompt: tuple[int, ...]
    max_tokens: int
    salt: str | None
    request_id: str
    refusable: bool = True
    """Whether its answer has not begun."""
    tokens: list[Any] = field(default_factory=list)
    kv: list[Any] = field(default_factory=list)
    """What was computed for each position."""
    admitted: bool = False
    finish_reason: str | None = None
    refusal: EnginePluginError | None = None
    """Why the gate ended it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def missing(self) -> int:
        """Tokens that the next step computes; 1 of a request that decodes."""
        return max(len(self.prompt) + len(self.tokens) - len(self.kv), 1)

    def end(self, reason: str) -> None:
        self.finish_reason = reason
        self.ended.set()


class GeneratingEngine(ABC):
    """An `EngineControl` that generates token by token.

    Args:
        services: what answers the calls of each worker, in rank order.
        generation: mark of the weights that new KV is of, read as each request arrives.
        board: where its gate tells the API processes of limits.

    Attributes:
        versions: labels published, in order.
        gate: of its prefills, over this process's real memory.
    """

    def __init__(
        self,
        services: Sequence[WorkerService],
        *,
        generation: Callable[[], str | None],
        board: GateBoard | None = None,
    ) -> None:
        self.versions: list[int] = []
        self._meter = RankMeter(HostStepMemory(ranks=1))
        self.gate = _gate(self._meter, board)
        self._numbers = itertools.count()
        self.prefix_cache: dict[tuple[str | None, tuple[int, ...]], list[Any]] = {}
        self._services = services
        self._generation = generation
        self._requests: list[Request] = []
        self._pause: PauseMode | None = None
        self._core = asyncio.Lock()
        self._threads = [ThreadPoolExecutor(max_workers=1) for _ in services]

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """What the engine is."""

    @abstractmethod
    def forward(self, tokens: Sequence[Any], kv: Sequence[Any]) -> tuple[list[Any], Any]:
        """KV of the tokens that have none yet, and the token that comes next."""

    @property
    def paused(self) -> bool:
        return self._pause is not None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Generate in the background; an error of the loop is the caller's."""
        loop = asyncio.create_task(self._generate())
        try:
            yield
        finally:
            loop.cancel()
            await asyncio.wait({loop})
            for thread in self._threads:
                thread.shutdown()
        if not loop.cancelled():
            loop.result()

    def submit(self, *prompt: int, max_tokens: int = ENDLESS, refusable: bool = True) -> Request:
        """Queue a request."""
        request = Request(
            prompt=prompt,
            max_tokens=max_tokens,
            salt=self._generation(),
            request_id=str(next(self._numbers)),
            refusable=refusable,
        )
        self._requests.append(request)
        return request

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """A core in the middle of a long step: it answers nothing meanwhile."""
        async with self._core:
            yield

    # -- EngineControl --------------------------------------------------------------------------

    def death(self) -> str | None:
        return None

    async def pause(self, mode: PauseMode) -> None:
        self._pause = mode
        if mode == "abort":
            self._end_all("abort")
        while self._pause == "wait" and any(request.admitted for request in self._requests):  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)

    async def resume(self) -> None:
        self._pause = None

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        flushed = []
        if prefix_cache:
            self.prefix_cache.clear()
            for request in self._requests:
                request.kv = []
            flushed.append("prefix_cache")
        return [*flushed, "multimodal_cache"] if multimodal_cache else flushed

    async def isolate_kv(self) -> None:
        for request in self._requests:
            if not request.kv:
                request.salt = self._generation()

    async def fail_requests(self) -> int:
        return self._end_all("error")

    async def end_waiting(self, reason: str) -> int:
        return 0  # there is no process between a client and the queue

    async def request_counts(self) -> RequestCounts:
        running = sum(request.admitted for request in self._requests)
        return RequestCounts(running=running, waiting=len(self._requests) - running)

    async def publish_version(self, version: int) -> None:
        self.versions.append(version)

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        loop = asyncio.get_running_loop()
        async with self._core:
            return await asyncio.gather(
                *(
                    loop.run_in_executor(thread, service.call, call, arguments)
                    for service, thread in zip(self._services, self._threads, strict=True)
                )
            )

    async def call_gate(self, call: str, arguments: bytes) -> bytes:
        async with self._core:
            return answer_call(self.gate.calls, call, arguments, who="the engine")

    # -- generation -----------------------------------------------------------------------------

    def _end_all(self, reason: str) -> int:
        ended = len(self._requests)
        for request in list(self._requests):
            self._end(request, reason)
        return ended

    def _end(self, request: Request, reason: str) -> None:
        self._requests.remove(request)
        request.end(reason)
        self.gate.forget([request.request_id], idle=not self._requests)

    async def _generate(self) -> None:
        for _ in itertools.count():
            async with self._core:
                waiting = [
                    request
                    for request in self._requests
                    if self._pause is None or (self._pause == "wait" and request.admitted)
                ]
                if self.gate.is_on and waiting:
                    self._gated(waiting)
                else:
                    for request in waiting:
                        self._step(request)
            await asyncio.sleep(TICK_S)

    def _gated(self, requests: Sequence[Request]) -> None:
        """One step of those that the gate lets in, each with all that it lacks."""
        for request in requests:
            request.kv = request.kv or self._cached(request)
        decoding = [each for each in requests if each.admitted and each.missing == 1]
        running = StepShape(tokens=len(decoding), rows=len(decoding))
        self.gate.begin(self.gate.figures(), running=running, in_flight=bool(decoding))
        let_in = [each for each in requests if each in decoding or self._may_prefill(each)]
        self._meter.before(self.gate.order(self.gate.gate.planned))
        for request in let_in:
            self._step(request)
        self._meter.after()

    def _may_prefill(self, request: Request) -> bool:
        """Ask the gate; a refused request ends here."""
        known = len(request.prompt) + len(request.tokens)
        decision = self.gate.decide(
            Candidate(
                request.request_id,
                request.missing,
                known,
                computed=known - request.missing,
                divisible=False,
                refusable=request.refusable and not request.tokens,
            )
        )
        request.refusal = decision.error()
        if request.refusal is not None:
            self._end(request, "error")
        return decision.outcome == "run"

    def _step(self, request: Request) -> None:
        """One token, computed from KV that may be shared with an earlier request's."""
        request.admitted = True
        if not request.kv:
            request.kv = self._cached(request)
        added, token = self.forward([*request.prompt, *request.tokens], request.kv)
        request.kv += added
        self.prefix_cache[request.salt, request.prompt] = request.kv[: len(request.prompt)]
        request.tokens.append(token)
        if len(request.tokens) >= request.max_tokens:
            self._end(request, "length")

    def _cached(self, request: Request) -> list[Any]:
        """KV of the longest prompt that this one begins with, under the same salt."""
        lengths = range(len(request.prompt), 0, -1)
        found = (self.prefix_cache.get((request.salt, request.prompt[:n])) for n in lengths)
        return list(next((kv for kv in found if kv is not None), []))


def _gate(meter: RankMeter, board: GateBoard | None) -> EngineGate:
    sizes = ModelSizes(hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=512)
    return make_engine_gate(
        ModelMemory(sizes, itemsize=4),
        Settings.load(),
        OwnRank(meter),
        smallest_chunk=SMALLEST_CHUNK,
        largest=None,
        entry=EntryKind(max_prompt=4096, divisible=False, logprobs_held_bytes=0),
        samples={},
        board=board,
        keep=None,
    )
