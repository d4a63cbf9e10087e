"""An engine within this process: real receivers, a request queue, and KV that remembers.

Every generated token says which weights computed it and which weights computed the KV that it
looked at, so a test can see half-new weights and stale KV where a real engine would only answer
differently. Generating from a model that is half loaded ends the engine's loop with an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engine_plugins.admin.engine_control import EngineInfo, PauseMode
from engine_plugins.errors import EngineCallError
from tests.support.generating_engine import GeneratingEngine, Request
from tests.support.in_memory_model import InMemoryModel, hf_tensors
from tests.support.in_memory_rank import InMemoryRank

__all__ = ["InMemoryEngine", "Request", "Token"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token: who computed it, and who computed what it attended to."""

    weights: str
    kv_weights: frozenset[str]


class InMemoryEngine(GeneratingEngine):
    """The `EngineControl` of an engine with one receiver per rank.

    Args:
        tp_size: how many ranks share the model.
        generation: mark of the weights that new KV is of, read as each request arrives.
        stall_timeout_s: as for the receivers.
        direct_landing: as for the receivers.

    Attributes:
        calls: every call of the control, in order.
        dead: whether calls fail as those of a dead engine do.
        fail_once: calls whose next one fails.
        freeze_at: the call at which the engine stops answering, until `go_on`.
    """

    def __init__(
        self,
        *,
        tp_size: int = 1,
        generation: Callable[[], str | None] = lambda: None,
        stall_timeout_s: float = 5.0,
        direct_landing: bool = False,
    ) -> None:
        self.ranks = [
            InMemoryRank(
                InMemoryModel.loaded(hf_tensors(seed=0), tp_rank=tp_rank, tp_size=tp_size),
                tp_rank=tp_rank,
                stall_timeout_s=stall_timeout_s,
                direct_landing=direct_landing,
            )
            for tp_rank in range(tp_size)
        ]
        super().__init__([rank.service for rank in self.ranks], generation=generation)
        self.calls: list[str] = []
        self.dead = False
        self.fail_once: set[str] = set()
        self.freeze_at: str | None = None
        self._moving = asyncio.Event()
        self._moving.set()

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

    def forward(self, tokens: Sequence[Any], kv: Sequence[str]) -> tuple[list[str], Token]:
        assert not any(rank.installer.loading for rank in self.ranks), "half-new weights served"
        added = [self.weights] * (len(tokens) - len(kv))
        return added, Token(weights=self.weights, kv_weights=frozenset([*kv, *added]))

    # -- what a test does with it ---------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Generate in the background; an error of the loop is the test's."""
        try:
            async with super().running():
                yield
        finally:
            self.close()

    def close(self) -> None:
        """Give every rank's memory back."""
        for rank in self.ranks:
            rank.close()

    async def answer(self, *prompt: int, max_tokens: int = 2) -> list[Token]:
        """Queue a request and wait for its end."""
        request = self.submit(*prompt, max_tokens=max_tokens)
        await request.ended.wait()
        assert request.finish_reason == "length", request.finish_reason
        return request.tokens

    def serves(self, *, seed: int) -> bool:
        """Whether every rank holds exactly the weights of a seed."""
        return all(rank.serves(seed=seed) for rank in self.ranks)

    @property
    def weights(self) -> str:
        """The weights that serve, as tokens name them."""
        return "+".join(rank.model.fingerprint() for rank in self.ranks)

    # -- EngineControl, on record and breakable -------------------------------------------------

    async def pause(self, mode: PauseMode) -> None:
        await self._called(f"pause {mode}")
        await super().pause(mode)

    async def resume(self) -> None:
        await self._called("resume")
        await super().resume()

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        await self._called("flush")
        return await super().flush(prefix_cache=prefix_cache, multimodal_cache=multimodal_cache)

    async def isolate_kv(self) -> None:
        await self._called("isolate_kv")
        await super().isolate_kv()

    async def fail_requests(self) -> int:
        await self._called("fail_requests")
        return await super().fail_requests()

    async def publish_version(self, version: int) -> None:
        await self._called("publish_version")
        await super().publish_version(version)

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        await self._called(call)
        return await super().call_workers(call, arguments)

    def go_on(self) -> None:
        """Answer again, what was asked meanwhile in its order."""
        self.freeze_at = None
        self._moving.set()

    async def _called(self, call: str) -> None:
        self.calls.append(call)
        if call == self.freeze_at:
            self._moving.clear()
        await self._moving.wait()
        if self.dead or call in self.fail_once:
            self.fail_once.discard(call)
            raise EngineCallError(f"the engine did not answer: {call}", remedy="start it anew")
