"""KV of other weights, and of another life of the server, is not found in vLLM's core."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.v1.engine.core import EngineCore

from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.admin.state import Fence, moved
from engine_plugins.errors import ConflictError
from vllm_ext.core_hooks import _salt_new_requests


def salt_of(shared: SharedState, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a request without a salt is hashed with."""
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, request: request)
    _salt_new_requests(lambda core: shared)
    add: Any = EngineCore.preprocess_add_request
    return str(add(None, SimpleNamespace(cache_salt=None)).cache_salt)


def test_every_request_is_marked_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lives that install the same version have no mark in common."""
    salts = []
    for life in ("first", "second"):
        create_runtime_dir(tmp_path / life)
        shared = SharedState(tmp_path / life)
        salts.append(salt_of(shared, monkeypatch))
        shared.change(lambda state: msgspec.structs.replace(state, kv_generation="weights-1.1"))
        salts.append(salt_of(shared, monkeypatch))
    assert len(set(salts)) == 4
    assert all(salt.startswith("\x00engine-plugins:") for salt in salts)


def test_a_request_that_comes_after_the_fence_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was let in before; the core's own error handling ends what cannot be taken in."""
    create_runtime_dir(tmp_path / "run")
    shared = SharedState(tmp_path / "run")
    taken: list[object] = []
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, each: taken.append(each))
    _salt_new_requests(lambda core: shared)
    add: Any = EngineCore.preprocess_add_request
    add(None, SimpleNamespace(cache_salt=None))
    fence = Fence(code="x", detail="half way", remedy="update", attempted_version=1)
    shared.change(lambda state: moved(state, "fenced", fence=fence))
    with pytest.raises(ConflictError, match="fenced and does not serve: half way"):
        add(None, SimpleNamespace(cache_salt=None))
    assert len(taken) == 2, "images are taken in, as API processes count on it"
