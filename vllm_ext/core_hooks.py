"""What is added to vLLM's engine core: KV kept apart by weights, an end for requests, the gate.

Patches of `EngineCore`, each idempotent. The core has no plugin point for any; remove them when it
does.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.request import Request, RequestStatus

from engine_plugins.admin.engine_processes import sign_in
from engine_plugins.admin.kv_mark import marked
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import EnginePluginError, SettingsError, UnsupportedError
from engine_plugins.prefill_gate.engine_gate import EngineGate, no_gate
from engine_plugins.settings import Settings
from engine_plugins.weights.worker_service import answer_call, refuse
from vllm_ext.hooks import has_extension, settings_of

__all__ = ["hook_engine_core", "hook_gate"]

_GATE = "_engine_plugins_gate"
_HOOKED = "_engine_plugins_hooked"
_COUNTS = "engine_plugins_request_counts"


def hook_engine_core() -> None:
    """Add our methods to the engine core of this process."""
    if hasattr(EngineCore, _COUNTS):
        return
    shared = shared_state()
    _salt_new_requests(shared)
    EngineCore.engine_plugins_isolate_waiting = functools.partialmethod(_isolate_waiting, shared)
    EngineCore.engine_plugins_fail_requests = _fail_requests
    EngineCore.engine_plugins_gate_call = _gate_call
    # Last: where this one answers, the others are there too.
    setattr(EngineCore, _COUNTS, _request_counts)


def _salt_new_requests(shared: SharedState) -> None:
    """KV of other weights must not be found: the mark of the weights goes into the hash."""
    original = EngineCore.preprocess_add_request

    @functools.wraps(original)
    def preprocess_add_request(
        self: EngineCore, request: EngineCoreRequest, *args: Any, **kwargs: Any
    ) -> Any:
        request.cache_salt = marked(request.cache_salt, shared.read().kv_mark)
        return original(self, request, *args, **kwargs)

    EngineCore.preprocess_add_request = preprocess_add_request


def _request_counts(self: EngineCore) -> list[int]:
    running, waiting = self.scheduler.get_request_counts()
    return [running, waiting]


def _isolate_waiting(self: EngineCore, shared: SharedState) -> int:
    """Give requests that hold no KV the mark of the new weights; say how many.

    They were hashed when they arrived. Those that hold KV keep it, under the old mark.
    """
    mark = shared.read().kv_mark
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


def hook_gate() -> None:
    """Put the prefill gate in front of the scheduler as soon as both it and the ranks are there.

    The core loads plugins within its `__init__`: what is wrapped is a method that this calls then.
    """
    original = EngineCore._initialize_effective_attention_block_size
    if hasattr(original, _HOOKED):
        return

    @functools.wraps(original)
    def initialize(self: EngineCore, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = self.vllm_config
        ours = has_extension(config.parallel_config.worker_extension_cls)
        if ours:
            sign_in(shared_state().runtime_dir, "engine core")
        settings = settings_of(config.additional_config, ours=ours)
        if settings.prefill_gate != "off" or ours:
            setattr(self, _GATE, _gate_or_reason(self, settings))

    setattr(initialize, _HOOKED, True)
    EngineCore._initialize_effective_attention_block_size = initialize


def _gate_or_reason(core: EngineCore, settings: Settings) -> EngineGate | EnginePluginError:
    """A gate that is off must not keep an engine from serving, whatever goes wrong with it."""
    try:
        # Late: an API process has no use for it, and another release may lack what it imports.
        from vllm_ext.prefill_gate import install_gate

        return install_gate(core, settings)
    except SettingsError:
        raise
    except Exception as error:
        if settings.prefill_gate != "off":
            raise
        return no_gate(error)


def _gate_call(self: EngineCore, call: str, arguments: bytes) -> bytes:
    gate: EngineGate | EnginePluginError | None = getattr(self, _GATE, None)
    if gate is None:
        gate = UnsupportedError("this vLLM has no place for the prefill gate")
    if isinstance(gate, EnginePluginError):
        return refuse(gate)
    return answer_call(gate.calls, call, arguments, who="the engine core")
