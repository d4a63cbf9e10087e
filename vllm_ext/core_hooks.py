"""What is added to vLLM's engine core: KV kept apart by weights, an end for requests, the gate.

Patches of `EngineCore`, each idempotent. The core has no plugin point for any; remove them when it
does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.request import Request, RequestStatus

from engine_plugins.admin.engine_processes import sign_in
from engine_plugins.admin.kv_mark import marked
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, hold_runtime_dir, shared_state
from engine_plugins.admin.server_end import end_with_first_process
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import refusal
from engine_plugins.errors import ConflictError
from engine_plugins.prefill_gate.engine_gate import EngineGate
from engine_plugins.prefill_gate.entry import GateBoard
from engine_plugins.prefill_gate.gate_on_demand import GateOnDemand
from engine_plugins.settings import Settings
from engine_plugins.weights.receiving.worker_messages import answer_call
from vllm_ext.asked import has_extension
from vllm_ext.hooks import settings_of

__all__ = ["hook_core_start", "hook_engine_core"]

_GATE = "_engine_plugins_gate"
_STATE = "_engine_plugins_state"
_HOOKED = "_engine_plugins_hooked"
_COUNTS = "engine_plugins_request_counts"


def hook_engine_core() -> None:
    """Add our methods to the engine core of this process."""
    hold_runtime_dir()
    if hasattr(EngineCore, _COUNTS):
        return
    _salt_new_requests(_state_of)
    EngineCore.engine_plugins_isolate_waiting = _isolate_waiting
    EngineCore.engine_plugins_fail_requests = _fail_requests
    EngineCore.engine_plugins_gate_call = _gate_call
    # Last: where this one answers, the others are there too.
    setattr(EngineCore, _COUNTS, _request_counts)


def _state_of(core: EngineCore) -> SharedState | None:
    """The state of a core's server; `None` of one without our extension, whose weights stay."""
    try:
        state: SharedState | None = getattr(core, _STATE)
    except AttributeError:
        ours = has_extension(core.vllm_config.parallel_config.worker_extension_cls)
        state = shared_state() if ours else None
        setattr(core, _STATE, state)
    return state


def _salt_new_requests(state_of: Callable[[EngineCore], SharedState | None]) -> None:
    """KV of other weights must not be found: the mark of the weights goes into the hash.

    A request that was let in before a fence closed, and comes after the fence has ended all others,
    would wait in a core that stands still. Its error ends it; nothing can come between this look
    and the end of the others, which the same thread takes in.
    """
    original = EngineCore.preprocess_add_request

    @functools.wraps(original)
    def preprocess_add_request(
        self: EngineCore, request: EngineCoreRequest, *args: Any, **kwargs: Any
    ) -> Any:
        shared = state_of(self)
        if shared is None:
            return original(self, request, *args, **kwargs)
        state = shared.read()
        request.cache_salt = marked(request.cache_salt, state.kv_mark)
        # First, since API processes count on it that the core has what they sent of an image.
        made = original(self, request, *args, **kwargs)
        refused = refusal(state)
        if refused is not None:
            raise ConflictError(refused)
        return made

    EngineCore.preprocess_add_request = preprocess_add_request


def _request_counts(self: EngineCore) -> list[int]:
    running, waiting = self.scheduler.get_request_counts()
    return [running, waiting]


def _isolate_waiting(self: EngineCore) -> int:
    """Give requests that hold no KV the mark of the new weights; say how many.

    They were hashed when they arrived. Those that hold KV keep it, under the old mark.
    """
    shared = _state_of(self)
    mark = None if shared is None else shared.read().kv_mark
    changed = 0
    for request in list(self.scheduler.requests.values()):
        if request.num_computed_tokens == 0 and not request.is_finished():
            _rehash(request, marked(request.cache_salt, mark))
            changed += 1
    return changed


def _rehash(request: Request, salt: str | None) -> None:
    request.cache_salt = salt
    request.block_hashes = []
    request.update_block_hashes()


def _fail_requests(self: EngineCoreProc) -> int:
    """End every request, running or queued, with finish reason `error`; say how many."""
    ended = self.scheduler.finish_requests(None, RequestStatus.FINISHED_ERROR)
    by_client: dict[int, list[str]] = {}
    for request in ended:
        by_client.setdefault(request.client_index, []).append(request.request_id)
    for client, request_ids in by_client.items():
        self._send_finish_outputs_to_client(request_ids, client, FinishReason.ERROR)
    return len(ended)


def hook_core_start() -> None:
    """Have a core say that it is there, and make the gate that its start asks for.

    By now both the scheduler and the ranks are there. The core loads plugins within its
    `__init__`: what is wrapped is a method that this calls then.
    """
    original = EngineCore._initialize_effective_attention_block_size
    if hasattr(original, _HOOKED):
        return

    @functools.wraps(original)
    def initialize(self: EngineCore, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        state = _state_of(self)  # opened now: the directory may be removed under a running server
        if state is not None:
            sign_in(state.runtime_dir, "engine core")
            end_with_first_process(state.runtime_dir)
        settings = _settings(self)
        if settings.prefill_gate != "off":
            setattr(self, _GATE, _make_gate(self, settings))

    setattr(initialize, _HOOKED, True)
    EngineCore._initialize_effective_attention_block_size = initialize


def _gate_call(self: EngineCore, call: str, arguments: bytes) -> bytes:
    """Answer a call about the gate, between two steps; a gate that is off is made by none."""
    gate: EngineGate | GateOnDemand | None = getattr(self, _GATE, None)
    if gate is None:
        gate = GateOnDemand(
            _settings(self),
            functools.partial(_make_gate, self),
            on_host=current_platform.is_cpu(),
            board=GateBoard(Path(os.environ[RUNTIME_DIR])),
        )
        setattr(self, _GATE, gate)
    return answer_call(gate.calls, call, arguments, who="the engine core")


def _make_gate(core: EngineCore, settings: Settings) -> EngineGate:
    # Late: a core without a gate has no use for it, and another release may lack what it imports.
    from vllm_ext.prefill_gate import install_gate

    return install_gate(core, settings)


def _settings(core: EngineCore) -> Settings:
    config = core.vllm_config
    ours = has_extension(config.parallel_config.worker_extension_cls)
    return settings_of(config.additional_config, ours=ours)
