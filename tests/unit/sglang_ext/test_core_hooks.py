"""KV of other weights, and of another life of the server, is not found in SGLang's scheduler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.mem_cache.utils import storage_namespace_seed

from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from sglang_ext.core_hooks import (
    SchedulerHooks,
    end_if_fenced,
    mark_from_the_start,
    mark_new_request,
)


def key_of(scheduler: SimpleNamespace) -> str:
    """What a request without a key of its own is filed under."""
    request = SimpleNamespace(extra_key=None)
    mark_new_request(scheduler, request)
    return str(request.extra_key)


def test_every_request_is_marked_from_the_start(tmp_path: Path) -> None:
    """HiCache's storage outlives the server: two lives have no mark in common."""
    keys = []
    for life in ("first", "second"):
        create_runtime_dir(tmp_path / life)
        mark = SharedState(tmp_path / life).read().kv_mark
        grammars = SimpleNamespace(grammar_queue=[])
        scheduler = SimpleNamespace(waiting_queue=[], grammar_manager=grammars)
        mark_from_the_start(scheduler, mark)
        keys.append(key_of(scheduler))
        assert SchedulerHooks(scheduler).calls["scheduler_isolate_kv"](f"{mark}:weights-1.1") == 0
        keys.append(key_of(scheduler))
    assert len(set(keys)) == 4
    # HiCache does not start on a CPU: this is what its storage's keys begin with.
    assert len({storage_namespace_seed(key, None) for key in keys}) == 4
    assert all(key.startswith("\x00engine-plugins:") for key in keys)


class FencedScheduler:
    """As much of SGLang's scheduler as ends requests that wait."""

    def __init__(self) -> None:
        self.waiting_queue: list[SimpleNamespace] = []
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.ended: list[tuple[str, str]] = []

    def pause_generation(self, request: PauseGenerationReqInput) -> None:
        assert request.mode == "retract"

    def abort_request(self, request: AbortReq) -> None:
        why = request.finished_reason or {}
        self.ended += [(each.rid, why["message"]) for each in self.waiting_queue]
        self.waiting_queue.clear()

    def takes(self, rid: str) -> None:
        """A request comes in, as it does behind our hook."""
        request = SimpleNamespace(rid=rid, input_ids=[1], kv=SimpleNamespace(holds_kv=False))
        request.extra_key = None
        self.waiting_queue.append(request)
        end_if_fenced(None, self, request)


def test_what_comes_after_the_fence_ends_until_weights_are_good() -> None:
    """It was let in before, and all others were ended before it came; the probe waits."""
    scheduler = FencedScheduler()
    calls = SchedulerHooks(scheduler).calls
    scheduler.takes("first")
    assert scheduler.ended == []
    assert calls["scheduler_fail_requests"]("half way") == 1
    scheduler.takes("late")
    assert scheduler.ended == [("first", "half way"), ("late", "half way")]
    scheduler.takes(HEALTH_CHECK_RID_PREFIX + "_1")
    assert len(scheduler.waiting_queue) == 1
    calls["scheduler_isolate_kv"]("weights-2.1")
    scheduler.takes("after")
    assert len(scheduler.waiting_queue) == len(scheduler.ended) == 2
