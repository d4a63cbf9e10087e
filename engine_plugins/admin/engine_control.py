"""The seam between the admin contract and an engine.

An engine is driven through its own hooks; nothing here knows which engine it is.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from engine_plugins.errors import EngineCallError, EnginePluginError

__all__ = [
    "EngineControl",
    "EngineInfo",
    "InFlightKV",
    "PauseMode",
    "RequestCounts",
    "engine_answer",
]

T = TypeVar("T")

PauseMode = Literal["keep", "wait", "abort"]
"""`keep` freezes requests where they are, `wait` lets them finish, `abort` ends them."""

InFlightKV = Literal["recompute", "keep"]
"""Whether requests held over an update rebuild their KV with the new weights."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine is, fixed for its life."""

    kind: str
    version: str
    plugin_version: str
    model: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    model_facts: dict[str, str | int | bool]
    starts_empty: bool = False
    """Whether it was started without weights (load format dummy)."""


@dataclass(frozen=True, kw_only=True)
class RequestCounts:
    """Requests in the engine; `None` where it is too busy to say at once."""

    running: int | None
    waiting: int | None


class EngineControl(Protocol):
    """One engine, driven from one of its API processes."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        ...

    def death(self) -> str | None:
        """Why the engine's own client holds it for dead; None while it does not."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stop scheduling; returns when generation stands still. New requests are held."""
        ...

    async def resume(self) -> None:
        """Schedule again."""
        ...

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        """Empty caches and say which; held requests will compute their KV anew."""
        ...

    async def isolate_kv(self) -> None:
        """Keep held requests' KV, and keep every request that has none away from old KV."""
        ...

    async def fail_requests(self) -> int:
        """End every held and queued request with an error; say how many."""
        ...

    async def end_waiting(self, reason: str) -> int:
        """End the requests that this API process waits for, without the engine; say how many."""
        ...

    async def request_counts(self) -> RequestCounts:
        """How many requests there are, as soon as the engine can say."""
        ...

    async def publish_version(self, version: int) -> None:
        """Have the engine label what it generates from now on."""
        ...

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        """Have every worker answer a call of `weights.worker_service`, in rank order."""
        ...

    async def call_gate(self, call: str, arguments: bytes) -> bytes:
        """Have the scheduler answer a call of `EngineGate.calls`; all its ranks do the same."""
        ...


async def engine_answer(call: Awaitable[T], *, engine: str) -> T:
    """Await a call of the engine's own; whatever it raises becomes an error of ours.

    Raises:
        EngineCallError: the engine raised; the text says what.
    """
    try:
        return await call
    except EnginePluginError:
        raise
    except Exception as error:
        raise EngineCallError(
            f"{engine} answered with {type(error).__name__}: {error}",
            remedy="see the server's log; a dead engine must be started anew",
        ) from error
