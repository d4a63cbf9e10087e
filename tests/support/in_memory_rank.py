"""One engine rank without an engine: a real receiver over the in-memory model and wire."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine_plugins.errors import EnginePluginError
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.rank_memory import RankMemory
from engine_plugins.sleep.rank_sleep import RankSleep
from engine_plugins.weights.contract.manifest import SourceManifest
from engine_plugins.weights.contract.report import RankReport
from engine_plugins.weights.planning.plan_data import Step
from engine_plugins.weights.receiving.connection import ConnectResult, Direction
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.receiving.update_run import PreparedPlan, PullStatus
from engine_plugins.weights.receiving.worker_service import WorkerService
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.in_memory_model import InMemoryInstaller, InMemoryModel, hf_tensors
from tests.support.in_memory_regions import InMemoryRegions

__all__ = ["InMemoryRank"]

_serial = itertools.count()


class _BreakableReceiver(WeightReceiver):
    """A receiver whose calls fail when a test says so, before they do anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failures: dict[str, EnginePluginError] = {}

    def connect(
        self,
        plan_id: str,
        manifests: Sequence[SourceManifest],
        *,
        direction: Direction = "pull",
        tell_dtypes: bool = False,
    ) -> ConnectResult:
        self._maybe_fail("connect")
        return super().connect(plan_id, manifests, direction=direction, tell_dtypes=tell_dtypes)

    def start(
        self,
        plan_id: str,
        *,
        staged: bool,
        timeout_s: float,
        word: int | None = None,
        tell: Callable[[PullStatus], None] = lambda status: None,
    ) -> PullStatus:
        self._maybe_fail("start")
        return super().start(plan_id, staged=staged, timeout_s=timeout_s, word=word, tell=tell)

    def advance(self, *, budget_s: float) -> PullStatus:
        self._maybe_fail("advance")
        return super().advance(budget_s=budget_s)

    def finish(self) -> RankReport:
        self._maybe_fail("finish")
        return super().finish()

    def _install(self, prepared: PreparedPlan, step: Step, index: int) -> None:
        """And poison what was installed: nothing that a later step did not bring can pass."""
        super()._install(prepared, step, index)
        if not step.direct:
            held = prepared._buffer._memory  # type: ignore[attr-defined]
            offset = prepared.windows[index].offset_bytes
            held.tensor(offset, (step.nbytes,), torch.uint8).fill_(0xFF)  # NaN in every dtype

    def _maybe_fail(self, call: str) -> None:
        error = self.failures.pop(call, None)
        if error is not None:
            raise error


class InMemoryRank:
    """A worker's parts: model, installer, receiver, and the service that answers calls.

    Args:
        model: what this rank serves from.
        tp_rank: its number.
        stall_timeout_s, direct_landing: as for the receiver.
    """

    def __init__(
        self,
        model: InMemoryModel,
        *,
        tp_rank: int = 0,
        stall_timeout_s: float = 5.0,
        direct_landing: bool = False,
    ) -> None:
        self.model = model
        self.installer = InMemoryInstaller(model)
        self.transports: list[InMemoryTransport] = []
        self.receiver = _BreakableReceiver(
            self.installer,
            self._transport,
            tp_rank=tp_rank,
            stall_timeout_s=stall_timeout_s,
            direct_landing=direct_landing,
        )
        self.regions = InMemoryRegions()
        self.sleep_ledger = MemoryLedger(self.regions)
        self.free_bytes = 1 << 40
        sleep = RankSleep(
            self.sleep_ledger,
            RankMemory(tp_rank, None),
            self.receiver,
            sizes=lambda tag: 1 << 30,
            free=lambda device: self.free_bytes,
        )
        folder = Path(tempfile.mkdtemp(prefix="in-memory-rank-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.service = WorkerService(
            self.receiver,
            tp_rank=tp_rank,
            page=folder / "pull.page",
            calls=sleep.calls,
        )

    def serves(self, *, seed: int) -> bool:
        """Whether its weights are exactly those of a fresh start from a seed's."""
        layout = self.model.layout
        tensors = hf_tensors(seed=seed, layers=layout["layers"], hidden=layout["hidden"])
        fresh = self.model.twin()
        fresh.load_weights(tensors.items())
        return self.model.equals(fresh)

    def _transport(self) -> InMemoryTransport:
        self.transports.append(InMemoryTransport(f"engine-{next(_serial)}"))
        return self.transports[-1]

    def fail_next(self, call: str, error: EnginePluginError) -> None:
        """Have the next such call of the admin side fail."""
        self.receiver.failures[call] = error

    def wait(self, *, steps: int | None = None, within_s: float = 10.0) -> PullStatus:
        """Poll until so many steps (all of them) are here, or the pull has failed."""
        until = time.monotonic() + within_s
        while True:
            status = self.receiver.poll()
            wanted = status.steps_total if steps is None else steps
            if status.steps_ready >= wanted or status.error is not None:
                return status
            assert time.monotonic() < until, f"still {status}"
            time.sleep(0.001)

    def install_all(self, *, within_s: float = 10.0) -> RankReport:
        """Advance until every step is installed, then finish."""
        until = time.monotonic() + within_s
        while (status := self.receiver.advance(budget_s=0.05)).steps_installed < status.steps_total:
            assert time.monotonic() < until, f"still {status}"
        return self.receiver.finish()

    def close(self) -> None:
        """Give everything back."""
        self.receiver.close()
