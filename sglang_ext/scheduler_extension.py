"""Our part of every scheduler rank: one message that carries every call.

SGLang lets rank 0 alone answer, and an exception in a handler ends the server. So a call never
raises, and all ranks' outcomes are gathered before rank 0 answers.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed
from sglang.utils import TypeBasedDispatcher

from engine_plugins.admin.engine_processes import sign_in
from engine_plugins.admin.runtime_dir import RUNTIME_DIR, shared_state
from engine_plugins.engine_rank import make_rank_service
from engine_plugins.engine_release import GATE, UPDATES
from engine_plugins.errors import EngineCallError, EnginePluginError
from engine_plugins.prefill_gate.engine_gate import EngineGate
from engine_plugins.prefill_gate.entry import GateBoard
from engine_plugins.prefill_gate.gate_on_demand import GateOnDemand
from engine_plugins.settings import Settings
from engine_plugins.weights.receiving.worker_messages import refuse
from engine_plugins.weights.receiving.worker_service import WorkerService
from sglang_ext.core_hooks import SchedulerHooks, mark_from_the_start
from sglang_ext.engine_memory import memory_backend, tagged_tensors
from sglang_ext.hooks import missing
from sglang_ext.memory_baseline import memory_of
from sglang_ext.messages import EngineAnswer, EngineCall, register_messages
from sglang_ext.roll_call import report_present
from sglang_ext.weight_installer import SglangWeightInstaller

__all__ = ["SchedulerExtension", "attach_to_scheduler"]

logger = logging.getLogger(__name__)


class SchedulerExtension:
    """Answers the calls that an API process makes to all ranks.

    Args:
        scheduler: SGLang's scheduler of this process.
        gate: of its prefills.
    """

    def __init__(self, scheduler: Any, gate: EngineGate | GateOnDemand) -> None:
        self._scheduler, self._gate = scheduler, gate
        self._group = scheduler.tp_cpu_group
        self._service: WorkerService | None = None

    def answer(self, request: EngineCall) -> EngineAnswer:
        """Handle one call on this rank and gather what the others say."""
        own = self._outcome(request.call, request.arguments)
        return EngineAnswer(serial=request.serial, ranks=self._gathered(own))

    def _outcome(self, call: str, arguments: bytes) -> bytes:
        """This rank's answer; never raises, because the others wait for it."""
        try:
            if self._service is None:
                self._service = self._make_service()
            return self._service.call(call, arguments)
        except EnginePluginError as error:
            return refuse(error)
        except Exception as error:
            logger.exception("%s failed", call)
            return refuse(
                EngineCallError(f"{call}: {type(error).__name__}: {error}", remedy="see the log")
            )

    def _gathered(self, own: bytes) -> list[bytes]:
        size = torch.distributed.get_world_size(self._group)
        if size == 1:
            return [own]
        ranks: list[Any] = [None] * size
        torch.distributed.all_gather_object(ranks, own, group=self._group)
        return ranks

    def _make_service(self) -> WorkerService:
        settings = Settings.load()
        tensors = tagged_tensors(self._scheduler)
        return make_rank_service(
            SglangWeightInstaller(self._scheduler),
            memory_of(self._scheduler.tp_worker.model_runner),
            tp_size=torch.distributed.get_world_size(self._group),
            settings=settings,
            runtime_dir=Path(os.environ[RUNTIME_DIR]),
            backend=memory_backend(self._scheduler, tensors, settings),
            tensors=tensors,
            calls={**SchedulerHooks(self._scheduler).calls, **self._gate.calls},
        )


def attach_to_scheduler(result: None, scheduler: Any) -> None:
    """After `Scheduler.init_request_dispatcher`: our message has a handler on this rank."""
    register_messages()
    mark_from_the_start(scheduler, shared_state().read().kv_mark)
    settings = Settings.load()
    lost = [*missing(UPDATES), *(missing(GATE) if settings.prefill_gate != "off" else [])]
    extension = SchedulerExtension(scheduler, _gate(scheduler, settings, complete=not lost))
    scheduler._request_dispatcher += TypeBasedDispatcher([(EngineCall, extension.answer)])
    tp_rank = torch.distributed.get_rank(scheduler.tp_cpu_group)
    sign_in(shared_state().runtime_dir, "scheduler", tp_rank)
    report_present(tp_rank, lost)


def _gate(scheduler: Any, settings: Settings, *, complete: bool) -> EngineGate | GateOnDemand:
    """The gate where it is asked for; elsewhere nothing of it until somebody turns it on.

    Raises:
        SettingsError: a cap that this machine cannot hold.
        UnsupportedError: it is asked for, and cannot be.
    """

    # Late: a scheduler without a gate has no use for what it takes.
    def make(settings: Settings) -> EngineGate:
        from sglang_ext.prefill_gate import make_scheduler_gate

        return make_scheduler_gate(scheduler, settings)

    if settings.prefill_gate != "off" and complete:  # else the roll call ends this start
        return make(settings)
    first = torch.distributed.get_rank(scheduler.tp_cpu_group) == 0
    return GateOnDemand(
        replace(settings, prefill_gate="off"),
        make,
        on_host=scheduler.tp_worker.model_runner.device == "cpu",
        board=GateBoard(Path(os.environ[RUNTIME_DIR])) if first else None,
    )
