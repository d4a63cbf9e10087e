"""KV of other weights, and of another life of the server, is not found in SGLang's scheduler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from sglang.srt.mem_cache.utils import storage_namespace_seed

from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from sglang_ext.core_hooks import SchedulerHooks, mark_from_the_start, mark_new_request


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
