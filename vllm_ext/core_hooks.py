"""What is added to vLLM's engine core: KV kept apart by weights, and an end for held requests.

Patches of `EngineCore`, each idempotent. The core has no plugin point for either; remove them
when it does.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.request import Request, RequestStatus

from engine_plugins.admin.kv_mark import marked
from engine_plugins.admin.runtime_dir import shared_state
from engine_plugins.admin.shared_state import SharedState
from vllm_ext.versions import VLLM

__all__ = ["hook_engine_core"]


def hook_engine_core() -> None:
    """Add our methods to the engine core of this process."""
    if hasattr(EngineCore, "engine_plugins_request_counts"):
        return
    VLLM.check("vllm.v1.engine.core")
    shared = shared_state()
    _salt_new_requests(shared)
    EngineCore.engine_plugins_request_counts = _request_counts
    EngineCore.engine_plugins_isolate_waiting = functools.partialmethod(_isolate_waiting, shared)
    EngineCore.engine_plugins_fail_requests = _fail_requests


def _salt_new_requests(shared: SharedState) -> None:
    """KV of other weights must not be found: the mark of the weights goes into the hash.

    Before the first update there is no mark and hashes are vLLM's own.
    """
    original = EngineCore.preprocess_add_request

    @functools.wraps(original)
    def preprocess_add_request(self: EngineCore, request: EngineCoreRequest) -> Any:
        request.cache_salt = marked(request.cache_salt, shared.read().kv_generation)
        return original(self, request)

    EngineCore.preprocess_add_request = preprocess_add_request


def _request_counts(self: EngineCore) -> list[int]:
    running, waiting = self.scheduler.get_request_counts()
    return [running, waiting]


def _isolate_waiting(self: EngineCore, shared: SharedState) -> int:
    """Give requests that hold no KV the mark of the new weights; say how many.

    They were hashed when they arrived. Those that hold KV keep it, under the old mark.
    """
    generation = shared.read().kv_generation
    changed = 0
    for request in list(self.scheduler.requests.values()):
        if request.num_computed_tokens == 0 and not request.is_finished():
            _rehash(request, marked(request.cache_salt, generation))
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
