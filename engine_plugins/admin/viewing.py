"""What `GET /admin/v1/state` says of an engine: at once, also while the engine is busy or dead."""

from __future__ import annotations

import asyncio

import msgspec

from engine_plugins.admin.absent_parts import absent_parts
from engine_plugins.admin.background import Background
from engine_plugins.admin.engine_control import EngineControl, RequestCounts
from engine_plugins.admin.schemas import (
    AbsentView,
    EngineView,
    RequestsView,
    StateView,
    WorkerView,
)
from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState
from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.weights.receiving.worker_messages import WorkerDescription

__all__ = ["Viewing"]

BUSY_WAIT_S = 0.05
"""How long /state waits for an engine that may be busy; what it has not said then is unknown."""


class Viewing:
    """The view of an engine from one of its API processes.

    Args:
        control: the engine.
        shared: the state that every process sees.
        background: where questions go on that the engine has not answered in time.
    """

    def __init__(self, control: EngineControl, shared: SharedState, background: Background) -> None:
        self._control = control
        self._shared = shared
        self._workers = WorkerCalls(control)
        self._background = background
        self._describing: asyncio.Task[list[WorkerDescription]] | None = None
        self._counting: asyncio.Task[RequestCounts] | None = None

    async def state(self) -> StateView:
        """Everything about the engine that can be said at once."""
        state = self._shared.read()
        counts = await self._request_counts()
        info = self._control.info
        plain = msgspec.to_builtins(state)
        del plain["kv_life"], plain["kv_generation"], plain["holding"]
        return StateView(
            engine=EngineView(
                kind=info.kind,
                version=info.version,
                plugin_version=info.plugin_version,
                model=info.model,
                tensor_parallel_size=info.tensor_parallel_size,
                pipeline_parallel_size=info.pipeline_parallel_size,
            ),
            requests=RequestsView(running=counts.running, waiting=counts.waiting),
            workers=await self._worker_views(state),
            absent=[
                AbsentView(part=part, reason=reason)
                for part, reason in absent_parts(self._shared.runtime_dir).items()
            ],
            **plain,
        )

    async def _request_counts(self) -> RequestCounts:
        """Ask the engine, but do not wait for a busy one, nor ask it twice at a time."""
        task = self._counting
        if task is None or task.done():
            task = self._counting = self._background.keep(self._control.request_counts())
        await asyncio.wait({task}, timeout=BUSY_WAIT_S)
        if not task.done() or task.exception() is not None:
            return RequestCounts(running=None, waiting=None)
        return task.result()

    async def _worker_views(self, state: EngineState) -> list[WorkerView]:
        """Who the workers are; asked once, not during an update, and not waited for too long."""
        task = self._describing
        if task is None or (task.done() and task.exception() is not None):
            if state.state == "updating":
                return []
            task = self._describing = self._background.keep(self._workers.describe())
        await asyncio.wait({task}, timeout=BUSY_WAIT_S)
        if not task.done() or task.exception() is not None:
            return []
        return [
            WorkerView(tp_rank=each.tp_rank, pid=each.pid, host=each.host) for each in task.result()
        ]
