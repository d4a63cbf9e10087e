"""Where one plan's bytes land: a ring of steps in an arena, scratch, live parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.hardware.free_memory import surely_free_bytes
from engine_plugins.weights.memory.arena import Arena
from engine_plugins.weights.memory.live_memory import LiveMemory
from engine_plugins.weights.planning.plan import FetchPlan, PackedPiece, schedule
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
        if staged:
            _check_memory(self.nbytes)
        self._arena = Arena(self.nbytes, transport) if self.nbytes else None

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
        """Views of a step's whole tensors, by HF name; not of a direct step."""
        base = self.windows[index].offset_bytes
        return [
            (tensor.name, self._memory.tensor(base + offset, tensor.shape, tensor.dtype))
            for tensor, offset in self._plan.steps[index].landings
        ]

    def spread(self, index: int, piece: PackedPiece) -> None:
        """Put what is wanted of a step's packed rows from the scratch area into its place."""
        rows = self._memory.tensor(
            self.ring_bytes + piece.scratch_offset, piece.form.shape, piece.form.dtype
        )
        wanted = rows[piece.form.wanted]
        self._target(index, piece, wanted.shape).copy_(wanted)

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

    def _target(self, index: int, piece: PackedPiece, shape: Sequence[int]) -> torch.Tensor:
        strides, dtype = piece.form.target_strides, piece.form.dtype
        if self._live is not None and self._plan.steps[index].direct:
            return self._live.strided(piece.target, shape, strides, dtype)
        at = self.windows[index].offset_bytes + piece.target
        return self._memory.strided(at, shape, strides, dtype)


def _check_memory(wanted_bytes: int) -> None:
    """Refuse to stage what cannot be held here: the kernel would end the engine for it."""
    free = surely_free_bytes()  # once more: others may have taken memory since the mode was chosen
    if wanted_bytes > free:
        raise UnsupportedError(
            f"staging needs {wanted_bytes / 2**30:.1f} GiB of memory on this rank and "
            f"{free / 2**30:.1f} are free; nothing was fetched",
            remedy="update with mode in_place",
        )
