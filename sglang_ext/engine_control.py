"""Driving an SGLang engine from one of its API processes, through SGLang's tokenizer manager."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import sglang
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
    UpdateWeightVersionReqInput,
)

import engine_plugins
from engine_plugins.admin.engine_control import (
    EngineInfo,
    PauseMode,
    RequestCounts,
    engine_answer,
)
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.state import refusal
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.errors import ConflictError, EngineCallError
from engine_plugins.weights.boxes.model_facts import model_facts
from sglang_ext.core_hooks import fenced
from sglang_ext.scheduler_calls import SchedulerCalls

__all__ = ["SglangEngineControl"]

DRAIN_POLL_S = 0.05

_sglang = functools.partial(engine_answer, engine="SGLang")


class SglangEngineControl:
    """The `EngineControl` of an SGLang server.

    Args:
        tokenizer_manager: SGLang's `TokenizerManager` in this API process.
        calls: our calls to the schedulers.
    """

    def __init__(self, tokenizer_manager: Any, calls: SchedulerCalls) -> None:
        self._manager = tokenizer_manager
        self._calls = calls
        self._schedulers = WorkerCalls(self)
        self._shared = shared_state()
        self._pauses = 0
        """Counts pauses and resumes: a pause after which one has come is nobody's any more."""
        self._telling = asyncio.Lock()
        """Pause and resume reach SGLang in the order in which they were counted."""
        arguments = tokenizer_manager.server_args
        self._info = EngineInfo(
            kind="sglang",
            version=sglang.__version__,
            plugin_version=engine_plugins.__version__,
            model=str(tokenizer_manager.served_model_name),
            tensor_parallel_size=arguments.tp_size,
            pipeline_parallel_size=1,
            model_facts=model_facts(tokenizer_manager.model_config.hf_config),
            starts_empty=arguments.load_format == "dummy",
        )

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._info

    def death(self) -> str | None:
        """An API process of SGLang's is told of no scheduler's end."""
        return None

    async def pause(self, mode: PauseMode) -> None:
        """Freeze requests in the engine, let them finish, or abort them.

        Whatever the mode, the schedulers end up in SGLang's `in_place` pause. SGLang does not
        answer a pause: the question behind it is answered once it has taken effect. While requests
        drain, API processes hold new ones because the state has a `Holder`.

        Raises:
            ConflictError: resumed meanwhile; nobody waits for this pause any more.
        """
        self._pauses += 1
        ours = self._pauses
        if mode != "keep":
            await self._drain(ours=ours, abort=mode == "abort")
        async with self._telling:
            # A scheduler in a long step answers late: the pause may have been given up meanwhile.
            self._require_wanted(ours)
            await _sglang(self._manager.pause_generation(PauseGenerationReqInput(mode="in_place")))
        if not all(await self._schedulers.ask("scheduler_is_paused", bool)):
            raise EngineCallError("SGLang was told to pause and did not")

    async def resume(self) -> None:
        """Schedule again."""
        self._pauses += 1
        go_on = ContinueGenerationReqInput(torch_empty_cache=False)
        async with self._telling:
            await _sglang(self._manager.continue_generation(go_on))

    async def flush(self, *, prefix_cache: bool, multimodal_cache: bool) -> list[str]:
        """Empty caches; requests that hold KV are retracted and will recompute it."""
        flushed: list[str] = []
        if prefix_cache:
            await self._schedulers.ask("scheduler_flush", type(None))
            flushed.append("prefix_cache")
        if multimodal_cache:
            await self._schedulers.ask("scheduler_flush_multimodal", type(None))
            if self._manager.mm_processor is not None:
                self._manager.mm_processor.clear_preprocess_cache()
            flushed.append("multimodal_cache")
        return flushed

    async def isolate_kv(self) -> None:
        """Requests that hold no KV yet, and new ones, will not find any of older weights."""
        mark = self._shared.read().kv_mark
        await self._schedulers.ask("scheduler_isolate_kv", int, mark=mark)

    async def fail_requests(self) -> int:
        """End every held and queued request with an error.

        Those that this and other API processes hold end by themselves when they see the fence.
        """
        reason = refusal(self._shared.read()) or "the engine ended its requests"
        return max(await self._schedulers.ask("scheduler_fail_requests", int, reason=reason))

    async def end_waiting(self, reason: str) -> int:
        """As if the schedulers had aborted them; those end their own once they go on."""
        waiting = list(self._manager.rid_to_state)
        for rid in waiting:
            self._manager._handle_abort_req(AbortReq(rid=rid, finished_reason=fenced(reason)))
        return len(waiting)

    async def request_counts(self) -> RequestCounts:
        """Ask the schedulers, which all hold the same requests."""
        running, waiting = (await self._schedulers.ask("scheduler_request_counts", list[int]))[0]
        return RequestCounts(running=running, waiting=waiting)

    async def publish_version(self, version: int) -> None:
        """Have SGLang note on every output which weights made it."""
        label = UpdateWeightVersionReqInput(new_version=str(version), abort_all_requests=False)
        await _sglang(self._manager.update_weight_version(label))

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        """One answer per scheduler rank."""
        return await _sglang(self._calls.ask(call, arguments))

    async def call_gate(self, call: str, arguments: bytes) -> bytes:
        """What every scheduler rank answers, told once."""
        return (await self.call_workers(call, arguments))[0]

    async def _drain(self, *, ours: int, abort: bool) -> None:
        """Wait until no request is under way, in the schedulers or on its way to or from them."""
        while not await self._is_drained(abort=abort):
            await asyncio.sleep(DRAIN_POLL_S)
            self._require_wanted(ours)

    def _require_wanted(self, ours: int) -> None:
        if self._pauses != ours:
            raise ConflictError("the engine was resumed before its requests had ended")

    async def _is_drained(self, *, abort: bool) -> bool:
        if abort:
            self._manager.abort_request(abort_all=True)
        counts = await self.request_counts()
        return not (counts.running or counts.waiting) and not (
            await self._manager.model_update_lock.is_locked()
        )
