"""Driving a vLLM engine from one of its API processes, through vLLM's own client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import vllm

import engine_plugins
from engine_plugins.admin.engine_control import EngineInfo, PauseMode, RequestCounts
from engine_plugins.errors import EngineCallError, EnginePluginError
from engine_plugins.weights.model_facts import model_facts

__all__ = ["VllmEngineControl"]

logger = logging.getLogger(__name__)

COUNTS_WAIT_S = 0.05
"""How long /state waits for a core that may be busy; afterwards the counts are unknown."""

T = TypeVar("T")


class VllmEngineControl:
    """The `EngineControl` of a vLLM server.

    Args:
        client: vLLM's `AsyncLLM` in this API process.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        config = client.vllm_config
        self._info = EngineInfo(
            kind="vllm",
            version=vllm.__version__,
            plugin_version=engine_plugins.__version__,
            model=str(config.model_config.served_model_name or config.model_config.model),
            tensor_parallel_size=config.parallel_config.tensor_parallel_size,
            pipeline_parallel_size=config.parallel_config.pipeline_parallel_size,
            model_facts=model_facts(config.model_config.hf_config),
        )
        self._counting: asyncio.Task[list[int]] | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    async def pause(self, mode: PauseMode) -> None:
        """Pause without touching caches: an update flushes after the new weights are in."""
        await _engine(self._client.pause_generation(mode=mode, clear_cache=False))

    async def resume(self) -> None:
        """Schedule again."""
        await _engine(self._client.resume_generation())

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        """Empty caches; requests that hold KV are preempted and will recompute it."""
        flushed: list[str] = []
        if prefix_cache:
            if not await _engine(self._client.reset_prefix_cache(reset_running_requests=True)):
                raise EngineCallError("vLLM could not reset its prefix cache")
            flushed.append("prefix_cache")
        if multimodal_cache:
            await _engine(self._client.reset_mm_cache())
            await _engine(self._client.reset_encoder_cache())
            flushed.append("multimodal_cache")
        return flushed

    async def isolate_kv(self) -> None:
        """Requests that hold no KV yet will not find any of older weights."""
        await self._core("engine_plugins_isolate_waiting")

    async def fail_requests(self) -> int:
        """End every held and queued request with an error."""
        return int(await self._core("engine_plugins_fail_requests"))

    async def request_counts(self) -> RequestCounts:
        """Ask the core, but do not wait for one that is busy."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._core("engine_plugins_request_counts"))
            self._counting.add_done_callback(_observe)
        done, _ = await asyncio.wait({self._counting}, timeout=COUNTS_WAIT_S)
        if not done or self._counting.exception() is not None:
            return RequestCounts(running=None, waiting=None)
        running, waiting = self._counting.result()
        return RequestCounts(running=running, waiting=waiting)

    async def publish_version(self, version: int) -> None:
        """Have vLLM note on every output which weights made it."""
        await _engine(self._client.update_weight_version(str(version)))

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        """One answer per worker. No timeout is passed: an expired call kills the engine."""
        answers = await _engine(
            self._client.collective_rpc(
                "engine_plugins_call", kwargs={"call": call, "arguments": arguments}
            )
        )
        return [bytes(answer) for answer in answers]

    async def _core(self, method: str) -> Any:
        return await _engine(self._client.engine_core.call_utility_async(method))


async def _engine(call: Awaitable[T]) -> T:
    """Await a call of vLLM's; whatever it raises becomes an error of ours."""
    try:
        return await call
    except EnginePluginError:
        raise
    except Exception as error:
        raise EngineCallError(
            f"vLLM answered with {type(error).__name__}: {error}",
            remedy="see the server's log; a dead engine must be started anew",
        ) from error


def _observe(task: asyncio.Task[list[int]]) -> None:
    """Have a late failure noticed, so that asyncio does not complain of it."""
    if not task.cancelled():
        task.exception()
