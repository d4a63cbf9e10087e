"""Driving a vLLM engine from one of its API processes, through vLLM's own client."""

from __future__ import annotations

import functools
from typing import Any

import vllm

import engine_plugins
from engine_plugins.admin.engine_control import (
    EngineInfo,
    PauseMode,
    RequestCounts,
    engine_answer,
)
from engine_plugins.errors import EngineCallError
from engine_plugins.weights.boxes.model_facts import model_facts
from vllm_ext.tied_head import config_facts

__all__ = ["VllmEngineControl"]


_vllm = functools.partial(engine_answer, engine="vLLM")


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
            model_facts={
                **model_facts(config.model_config.hf_config),
                **config_facts(config.model_config),
            },
            starts_empty=config.load_config.load_format == "dummy",
        )

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    def death(self) -> str | None:
        """VLLM's client learns it from the core's last message, or from its process's end."""
        return "vLLM's engine core has ended" if self._client.errored else None

    async def pause(self, mode: PauseMode) -> None:
        """Pause without touching caches: an update flushes after the new weights are in."""
        await _vllm(self._client.pause_generation(mode=mode, clear_cache=False))

    async def resume(self) -> None:
        """Schedule again."""
        await _vllm(self._client.resume_generation())

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        """Empty caches; requests that hold KV are preempted and will recompute it."""
        flushed: list[str] = []
        if prefix_cache:
            if not await _vllm(self._client.reset_prefix_cache(reset_running_requests=True)):
                raise EngineCallError("vLLM could not reset its prefix cache")
            flushed.append("prefix_cache")
        if multimodal_cache:
            await _vllm(self._client.reset_mm_cache())
            await _vllm(self._client.reset_encoder_cache())
            flushed.append("multimodal_cache")
        return flushed

    async def isolate_kv(self) -> None:
        """Requests that hold no KV yet will not find any of older weights."""
        await self._core("engine_plugins_isolate_waiting")

    async def fail_requests(self) -> int:
        """End every held and queued request with an error."""
        return int(await self._core("engine_plugins_fail_requests"))

    async def end_waiting(self, reason: str) -> int:
        """Aborted here; `explained` says why. The core ends its own once it goes on."""
        waiting = list(self._client.output_processor.request_states)
        if waiting:
            await self._client.abort(waiting, internal=True)
        return len(waiting)

    async def request_counts(self) -> RequestCounts:
        """Ask the core."""
        running, waiting = await self._core("engine_plugins_request_counts")
        return RequestCounts(running=running, waiting=waiting)

    async def publish_version(self, version: int) -> None:
        """Have vLLM note on every output which weights made it."""
        await _vllm(self._client.update_weight_version(str(version)))

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        """One answer per worker. No timeout is passed: an expired call kills the engine."""
        answers = await _vllm(
            self._client.collective_rpc(
                "engine_plugins_call", kwargs={"call": call, "arguments": arguments}
            )
        )
        return [bytes(answer) for answer in answers]

    async def call_gate(self, call: str, arguments: bytes) -> bytes:
        """The engine core's answer; it makes every decision."""
        return bytes(await self._core("engine_plugins_gate_call", call, arguments))

    async def _core(self, method: str, *arguments: Any) -> Any:
        return await _vllm(self._client.engine_core.call_utility_async(method, *arguments))
