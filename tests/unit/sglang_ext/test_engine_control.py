"""Pausing SGLang: a pause that was given up never takes effect afterwards.

The scheduler below answers as SGLang's does: between two of its steps, in the order in which it
was asked, and a pause not at all.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import PauseGenerationReqInput

from engine_plugins.admin.pausing import pause_within
from engine_plugins.admin.runtime_dir import RUNTIME_DIR
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.errors import ConflictError, PauseTimeoutError
from engine_plugins.weights.receiving.worker_messages import answer_call
from sglang_ext.engine_control import SglangEngineControl

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedState:
    create_runtime_dir(tmp_path / "run")
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path / "run"))
    return SharedState(tmp_path / "run")


class Scheduler:
    """A scheduler behind a tokenizer manager; each of its steps takes `step_s`."""

    served_model_name = "tiny"
    server_args = SimpleNamespace(tp_size=1, load_format="auto")
    model_config = SimpleNamespace(hf_config=SimpleNamespace(to_dict=dict))

    def __init__(self) -> None:
        self.paused = False
        self.running = 1
        self.step_s = 0.0
        self.ends_in_this_step = False
        self.model_update_lock = SimpleNamespace(is_locked=self._is_locked)

    async def _is_locked(self) -> bool:
        return False

    async def pause_generation(self, request: PauseGenerationReqInput) -> None:
        self.paused = True

    async def continue_generation(self, request: object) -> None:
        self.paused = False

    async def ask(self, call: str, arguments: bytes) -> list[bytes]:
        await asyncio.sleep(self.step_s)
        if self.ends_in_this_step:
            self.running = 0
        said: dict[str, Any] = {
            "scheduler_request_counts": [self.running, 0],
            "scheduler_is_paused": self.paused,
        }
        return [answer_call({call: lambda: said[call]}, call, msgspec.msgpack.encode({}), who="it")]


async def test_requests_that_end_as_the_pause_is_given_up(shared: SharedState) -> None:
    """The counts come back, empty, after the deadline, from a long step."""
    scheduler = Scheduler()
    control = SglangEngineControl(scheduler, scheduler)  # type: ignore[arg-type]
    asked = asyncio.create_task(pause_within(control, shared, "wait", 0.2))
    await asyncio.sleep(0.1)
    scheduler.step_s, scheduler.ends_in_this_step = 0.4, True
    with pytest.raises(PauseTimeoutError, match="serves as before"):
        await asked
    await asyncio.sleep(0.6)
    assert (scheduler.paused, shared.read().holding) == (False, None)


async def test_a_resume_overtakes_no_pause(shared: SharedState) -> None:
    """A pause waits for its turn while SGLang is being told of an earlier one."""
    scheduler = Scheduler()
    scheduler.running = 0
    control = SglangEngineControl(scheduler, scheduler)  # type: ignore[arg-type]
    async with control._telling:
        late = asyncio.create_task(control.pause("keep"))
        await asyncio.sleep(0.01)
        resumed = asyncio.create_task(control.resume())
        await asyncio.sleep(0.01)
    await resumed
    with pytest.raises(ConflictError, match="was resumed"):
        await late
    assert not scheduler.paused
