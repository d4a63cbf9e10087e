"""Where one plan's bytes land: a ring of steps in an arena, scratch, live parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.hardware.free_memory import surely_free_bytes
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.planning.plan_data import FetchPlan, PieceForm
from engine_plugins.weights.planning.ring import schedule
from engine_plugins.weights.receiving.spreading import Run, runs_of
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.regions import HOST

__all__ = ["ReceiveBuffer"]

HEADROOM = 4
"""In place, the arena holds the largest module and a quarter more for the next ones."""


class ReceiveBuffer:
    """Where each step and each packed piece of a plan lies.

    Args:
        plan: what lands.
        transport: registers the arena.
        staged: whether the arena holds every step at once, or the largest and a little more.
        live: the parameters that direct steps land in; it stays the caller's to close.

    Attributes:
        windows: of each step, in the arena.
        nbytes: of the arena, scratch included.

    Raises:
        UnsupportedError: the machine has not the memory to stage.
        TransportError: the memory cannot be registered.
    """

    def __init__(
        self, plan: FetchPlan, transport: Transport, *, staged: bool, live: LiveMemory | None
    ) -> None:
        largest = plan.largest_step_bytes
        self.ring_bytes = plan.total_bytes if staged else largest + largest // HEADROOM
        self.windows = schedule([step.nbytes for step in plan.steps], self.ring_bytes)
        self.nbytes = self.ring_bytes + plan.scratch_bytes
        self._plan = plan
        self._live = live
        self._runs: dict[tuple[int, int], list[Run]] = {}
        """Of a step's batch, the copies that spread it; found when it first came."""
        if staged:
            _check_memory(self.nbytes)
        margins = _margins(plan)
        self._arena = Arena(self.nbytes, transport, margins=margins) if self.nbytes else None

    def place(self, index: int) -> tuple[int, int]:
        """Address that a step's offsets count from, and the device of that memory."""
        if self._plan.steps[index].direct:
            return 0, HOST if self._live is None else self._live.device
        return self._memory.address + self.windows[index].offset_bytes, HOST

    @property
    def scratch(self) -> int:
        """Address of the scratch area, which is host memory."""
        return self._memory.address + self.ring_bytes

    def tensors(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """Views of a step's whole tensors, by HF name; not of a direct step.

        Only what is needed of each is there. What else a view shows is other memory: it is not to
        be written.
        """
        base, step = self.windows[index].offset_bytes, self._plan.steps[index]
        placed = zip(step.landings, step.strides_bytes.tolist(), strict=True)
        return [
            (each.tensor.name, self._view(base + each.offset_bytes, each.tensor, strides))
            for each, strides in placed
        ]

    def spread(self, index: int, batch: int) -> None:
        """Put what is wanted of a batch of a step's packed rows from the scratch area in place."""
        key = (index, batch)
        if key not in self._runs:
            self._runs[key] = self._placeable(index, runs_of(self._plan.steps[index].packed[batch]))
        for run in self._runs[key]:
            shape = (run.pieces, *run.form.shape)
            strides = (run.scratch_step, *_contiguous(run.form))
            at = self.ring_bytes + run.scratch
            rows = self._memory.strided(at, shape, strides, run.form.dtype)
            self._target(index, run).copy_(rows[(slice(None), *run.form.wanted)])

    def close(self) -> None:
        """Free the arena."""
        if self._arena is not None:
            self._arena.close()

    def quarantine(self, ended: Callable[[], bool], *, ends_with_agent: bool = True) -> None:
        """Give up the arena without freeing it: late bytes may still land in it.

        Args:
            ended: whether it is known that no more will.
            ends_with_agent: whether none can once the agent is closed.
        """
        if self._arena is not None:
            self._arena.quarantine(ended, ends_with_agent=ends_with_agent)

    @property
    def _memory(self) -> Arena:
        if self._arena is None:
            raise TransportError(
                "this plan has no receive buffer", remedy="this is a fault of the plan: report it"
            )
        return self._arena

    def _view(self, at: int, tensor: LogicalTensor, strides: Sequence[int]) -> torch.Tensor:
        if not prod(tensor.shape):
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        own = strides[len(strides) - len(tensor.shape) :]
        return self._memory.around(at, tensor.shape, own, tensor.dtype)

    def _placeable(self, index: int, runs: Sequence[Run]) -> list[Run]:
        """The runs, taken apart where their pieces go to several storages."""
        found: list[Run] = []
        for run in runs:
            try:
                self._target(index, run)
            except TransportError:
                found += run.singles()
            else:
                found.append(run)
        return found

    def _target(self, index: int, run: Run) -> torch.Tensor:
        shape, strides = run.wanted_shape, (run.target_step, *run.form.target_strides)
        if self._live is not None and self._plan.steps[index].direct:
            return self._live.strided(run.target, shape, strides, run.form.dtype)
        at = self.windows[index].offset_bytes + run.target
        return self._memory.strided(at, shape, strides, run.form.dtype)


def _contiguous(form: PieceForm) -> list[int]:
    """Strides in bytes of the rows of a form as they are read."""
    strides = [form.dtype.itemsize]
    for extent in reversed(form.shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides


def _margins(plan: FetchPlan) -> tuple[int, int]:
    """Bytes that views of whole tensors reach past the first place, and past the last."""
    laid = [step for step in plan.steps if not step.direct]
    front = max((-step.reach[0] for step in laid), default=0)
    return max(front, 0), max((step.reach[1] - step.nbytes for step in laid), default=0)


def _check_memory(wanted_bytes: int) -> None:
    """Refuse to stage what cannot be held here: the kernel would end the engine for it."""
    free = surely_free_bytes()  # once more: others may have taken memory since the mode was chosen
    if wanted_bytes > free:
        raise UnsupportedError(
            f"staging needs {wanted_bytes / 2**30:.1f} GiB of memory on this rank and "
            f"{free / 2**30:.1f} are free; nothing was fetched",
            remedy="update with mode in_place",
        )
