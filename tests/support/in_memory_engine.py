"""An engine within this process: real receivers, a request queue, and KV that remembers.

Every generated token says which weights computed it and which weights computed the KV that it
looked at, so a test can see half-new weights and stale KV where a real engine would only answer
differently. Generating from a model that is half loaded ends the engine's loop with an error.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine_plugins.admin.engine_control import EngineInfo, PauseMode, RequestCounts
from engine_plugins.errors import EngineCallError
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank

__all__ = ["InMemoryEngine", "Request", "Token"]

TICK_S = 0.002
ENDLESS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token: who computed it, and who computed what it attended to."""

    weights: str
    kv_weights: frozenset[str]


@dataclass(eq=False, kw_only=True)
class Request:
    """A request in the queue or behind it."""

    prompt: tuple[int, ...]
    max_tokens: int
    salt: str | None
    tokens: list[Token] = field(default_factory=list)
    kv: list[str] = field(default_factory=list)
    """Weights that computed the KV of each position."""
    admitted: bool = False
    finish_reason: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, reason: str) -> None:
        self.finish_reason = reason
        self.ended.set()


class InMemoryEngine:
    """The `EngineControl` of an engine with one receiver per rank.

    Args:
        tp_size: how many ranks share the model.
        generation: mark of the weights that new KV is of, read as each request arrives.
        stall_timeout_s: as for the receivers.

    Attributes:
        calls: every call of the control, in order.
        versions: labels published, in order.
        dead: whether calls fail as those of a dead engine do.
        fail_once: calls whose next one fails.
    """

    def __init__(
        self,
        *,
        tp_size: int = 1,
        generation: Callable[[], str | None] = lambda: None,
        stall_timeout_s: float = 5.0,
    ) -> None:
        self.ranks = [
            InMemoryRank(
                InMemoryModel.loaded(hf_tensors(seed=0), tp_rank=tp_rank, tp_size=tp_size),
                tp_rank=tp_rank,
                stall_timeout_s=stall_timeout_s,
            )
            for tp_rank in range(tp_size)
        ]
        self.calls: list[str] = []
        self.versions: list[int] = []
        self.dead = False
        self.fail_once: set[str] = set()
        self.prefix_cache: dict[tuple[str | None, tuple[int, ...]], list[str]] = {}
        self._generation = generation
        self._requests: list[Request] = []
        self._pause: PauseMode | None = None
        self._core = asyncio.Lock()
        self._threads = [ThreadPoolExecutor(max_workers=1) for _ in self.ranks]

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            kind="in_memory",
            version="1.0",
            plugin_version="1.0",
            model="tiny",
            tensor_parallel_size=len(self.ranks),
            pipeline_parallel_size=1,
            model_facts={"model_type": "tiny", "hidden_size": 16},
        )

    # -- what a test does with it ---------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[InMemoryEngine]:
        """Generate in the background; an error of the loop is the test's."""
        loop = asyncio.create_task(self._generate())
        try:
            yield self
        finally:
            loop.cancel()
            await asyncio.wait({loop})
            self.close()
        if not loop.cancelled():
            loop.result()

    def close(self) -> None:
        """Give every rank's memory and thread back."""
        for rank, thread in zip(self.ranks, self._threads, strict=True):
            thread.submit(rank.close).result()
            thread.shutdown()

    def submit(self, *prompt: int, max_tokens: int = ENDLESS) -> Request:
        """Queue a request."""
        request = Request(prompt=prompt, max_tokens=max_tokens, salt=self._generation())
        self._requests.append(request)
        return request

    async def answer(self, *prompt: int, max_tokens: int = 2) -> list[Token]:
        """Queue a request and wait for its end."""
        request = self.submit(*prompt, max_tokens=max_tokens)
        await request.ended.wait()
        assert request.finish_reason == "length", request.finish_reason
        return request.tokens

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """A core in the middle of a long step: it answers nothing meanwhile."""
        async with self._core:
            yield

    def serves(self, *, seed: int) -> bool:
        """Whether every rank holds exactly the weights of a seed."""
        size = len(self.ranks)
        return all(
            rank.model.equals(
                InMemoryModel.loaded(hf_tensors(seed=seed), tp_rank=tp_rank, tp_size=size)
            )
            for tp_rank, rank in enumerate(self.ranks)
        )

    @property
    def weights(self) -> str:
        """The weights that serve, as tokens name them."""
        return "+".join(rank.model.fingerprint() for rank in self.ranks)

    @property
    def paused(self) -> bool:
        return self._pause is not None

    # -- EngineControl --------------------------------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        self._called(f"pause {mode}")
        self._pause = mode
        if mode == "abort":
            for request in self._requests:
                request.end("abort")
            self._requests.clear()
        while self._pause == "wait" and any(request.admitted for request in self._requests):  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)

    async def resume(self) -> None:
        self._called("resume")
        self._pause = None

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        self._called("flush")
        flushed = []
        if prefix_cache:
            self.prefix_cache.clear()
            for request in self._requests:
                request.kv = []
            flushed.append("prefix_cache")
        return [*flushed, "multimodal_cache"] if multimodal_cache else flushed

    async def isolate_kv(self) -> None:
        self._called("isolate_kv")
        for request in self._requests:
            if not request.kv:
                request.salt = self._generation()

    async def fail_requests(self) -> int:
        self._called("fail_requests")
        ended = len(self._requests)
        for request in self._requests:
            request.end("error")
        self._requests.clear()
        return ended

    async def request_counts(self) -> RequestCounts:
        running = sum(request.admitted for request in self._requests)
        return RequestCounts(running=running, waiting=len(self._requests) - running)

    async def publish_version(self, version: int) -> None:
        self._called("publish_version")
        self.versions.append(version)

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        self._called(call)
        loop = asyncio.get_running_loop()
        async with self._core:
            return await asyncio.gather(
                *(
                    loop.run_in_executor(thread, rank.service.call, call, arguments)
                    for rank, thread in zip(self.ranks, self._threads, strict=True)
                )
            )

    # -- generation -----------------------------------------------------------------------------

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.dead or call in self.fail_once:
            self.fail_once.discard(call)
            raise EngineCallError(f"the engine did not answer: {call}", remedy="start it anew")

    async def _generate(self) -> None:
        for _ in itertools.count():
            async with self._core:
                for request in list(self._requests):
                    if self._pause is None or (self._pause == "wait" and request.admitted):
                        self._step(request)
            await asyncio.sleep(TICK_S)

    def _step(self, request: Request) -> None:
        """One token, computed from KV that may be shared with an earlier request's."""
        assert not any(rank.installer.loading for rank in self.ranks), "half-new weights served"
        request.admitted = True
        positions = len(request.prompt) + len(request.tokens)
        if not request.kv:
            request.kv = self._cached(request)
        request.kv += [self.weights] * (positions - len(request.kv))
        self.prefix_cache[request.salt, request.prompt] = request.kv[: len(request.prompt)]
        request.tokens.append(Token(weights=self.weights, kv_weights=frozenset(request.kv)))
        if len(request.tokens) >= request.max_tokens:
            self._requests.remove(request)
            request.end("length")

    def _cached(self, request: Request) -> list[str]:
        """KV of the longest prompt that this one begins with, under the same salt."""
        lengths = range(len(request.prompt), 0, -1)
        found = (self.prefix_cache.get((request.salt, request.prompt[:n])) for n in lengths)
        return list(next((kv for kv in found if kv is not None), []))
