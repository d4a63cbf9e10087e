"""A plan made ready to run: peers met, arena registered, reads prepared once for many updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch

from engine_plugins.errors import TransferTimeoutError, TransportError, UnsupportedError
from engine_plugins.weights.arena import Arena
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.plan import FetchPlan, PackedPiece, StepRead, schedule
from engine_plugins.weights.transport.base import PreparedTransfer, Transport
from engine_plugins.weights.transport.meeting import meet
from engine_plugins.weights.transport.transfers import run_transfers

__all__ = ["PreparedFetch"]

HEADROOM = 4
"""In place, the arena holds the largest module and a quarter more for the next ones."""

BATCH_BYTES = 64 << 20
"""The most that is fetched in one go; a step that is larger goes alone."""
SLOWEST_BYTES_PER_S = 100e6
"""A fetch may take the stall time and, on top, as long as it takes at this rate."""


class PreparedFetch:
    """Reads of every step of a plan into one arena. Used by one pull thread at a time."""

    def __init__(
        self,
        plan: FetchPlan,
        manifests: Sequence[SourceManifest],
        transport: Transport,
        *,
        staged: bool,
    ) -> None:
        self.plan = plan
        self.staged = staged
        self.usable = True
        self.touched = False
        """Whether bytes have been fetched into the arena, which makes it resident."""
        self.reads_may_be_active = False
        self.bytes_total = sum(step.bytes_to_move for step in plan.steps)
        self.reset_counters()
        largest = plan.largest_step_bytes
        capacity = plan.total_bytes if staged else largest + largest // HEADROOM
        if staged:
            _check_memory(capacity)
        self.windows = schedule([step.nbytes for step in plan.steps], capacity)
        self._scratch_offset = capacity
        self._sources = manifests
        self._transport = transport
        self._prepared: list[_PreparedStep] = []
        for manifest in manifests:
            meet(transport, manifest)
        self._arena = Arena(capacity + plan.scratch_bytes, transport)
        try:
            for index in range(len(plan.steps)):
                self._prepared.append(self._prepare_step(index))
        except BaseException:
            self.close()
            raise

    @property
    def arena_bytes(self) -> int:
        """Size of the receive buffer, scratch included."""
        return self._arena.nbytes

    def reset_counters(self) -> None:
        """Start counting bytes and wire seconds anew."""
        self.bytes_done = 0
        self.wire_s = 0.0

    def tensors(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """Views of a fetched step's whole tensors, by HF name."""
        base = self.windows[index].offset_bytes
        return [
            (
                landing.tensor.name,
                self._arena.tensor(
                    base + landing.offset_bytes, landing.tensor.shape, landing.tensor.dtype
                ),
            )
            for landing in self.plan.steps[index].landings
        ]

    def steps_with_room(self, index: int, installed: int) -> range:
        """Steps from `index` on that may be fetched together, once `installed` are installed.

        Together they cost one wait instead of one each. They take half of the arena at most, so
        that the other half can be installed meanwhile; a step that is larger goes alone.
        """
        limit = min(self._scratch_offset // 2, BATCH_BYTES)
        end, size = index + 1, self.plan.steps[index].nbytes
        while end < len(self.windows) and self.windows[end].installed_before <= installed:
            size += self.plan.steps[end].nbytes
            if size > limit:
                break
            end += 1
        return range(index, end)

    def run_steps(
        self,
        steps: range,
        *,
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Fetch steps; returns when all their bytes are in place.

        Raises:
            TransportError: with the peer's and the tensors' names. The reads are then in no state
                to be posted again: `usable` is false.
        """
        direct = [read for index in steps for read in self._prepared[index].reads]
        self._run(steps, direct, stall_timeout_s, deadline, cancelled)
        for index in steps:
            batches = self._prepared[index].batches
            targets = [tensor for _, tensor in self.tensors(index)] if batches else []
            for batch, reads in zip(self.plan.steps[index].packed, batches, strict=True):
                self._run(range(index, index + 1), reads, stall_timeout_s, deadline, cancelled)
                for piece in batch:
                    self._spread(piece, targets[piece.landing])

    def close(self) -> None:
        """Release the reads, then the arena."""
        self._release_reads()
        self._arena.close()

    def quarantine(self) -> None:
        """Give up the arena without freeing it: a read that timed out may still write to it."""
        self.usable = False
        self._arena.quarantine()

    def _run(
        self,
        steps: range,
        reads: Sequence[PreparedTransfer],
        stall_timeout_s: float,
        deadline: float,
        cancelled: Callable[[], bool],
    ) -> None:
        if not reads:
            return
        self.touched = True
        began, before = time.perf_counter(), self.bytes_done

        def count(done: int, _total: int) -> None:
            self.bytes_done = before + done

        patience = stall_timeout_s + sum(read.nbytes for read in reads) / SLOWEST_BYTES_PER_S
        limit = min(patience, max(deadline - time.monotonic(), 0.001))
        try:
            run_transfers(reads, deadline_s=limit, on_progress=count, cancelled=cancelled)
        except TransportError as error:
            self.usable = False
            self.reads_may_be_active = isinstance(error, TransferTimeoutError)
            landings = [each for index in steps for each in self.plan.steps[index].landings]
            names = [landing.tensor.name for landing in landings]
            error.message += (
                f"; it was giving {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}, after "
                f"{self.bytes_done} of {self.bytes_total} bytes"
            )
            raise
        self.wire_s += time.perf_counter() - began

    def _prepare_step(self, index: int) -> _PreparedStep:
        step = self.plan.steps[index]
        base = self._arena.address + self.windows[index].offset_bytes
        return _PreparedStep(
            reads=[self._read(read, base) for read in step.reads],
            batches=[self._packed_reads(batch) for batch in step.packed],
        )

    def _packed_reads(self, batch: Sequence[PackedPiece]) -> list[PreparedTransfer]:
        by_peer: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for piece in batch:
            row = (piece.scratch_offset, piece.remote_address, piece.nbytes)
            by_peer.setdefault((piece.source, piece.remote_device), []).append(row)
        base = self._arena.address + self._scratch_offset
        return [
            self._read(
                StepRead(
                    source=source,
                    remote_device=device,
                    descriptors=np.array(rows, dtype=np.uint64),
                ),
                base,
            )
            for (source, device), rows in by_peer.items()
        ]

    def _read(self, read: StepRead, base: int) -> PreparedTransfer:
        table = read.descriptors.copy()
        table[:, 0] += np.uint64(base)
        return self._transport.prepare_read(
            self._sources[read.source].agent,
            table,
            local_device=-1,
            remote_device=read.remote_device,
        )

    def _spread(self, piece: PackedPiece, target: torch.Tensor) -> None:
        rows = self._arena.tensor(
            self._scratch_offset + piece.scratch_offset, piece.shape, target.dtype
        )
        target[piece.slices].copy_(rows[piece.wanted])

    def _release_reads(self) -> None:
        for prepared in self._prepared:
            for read in prepared.reads + [each for batch in prepared.batches for each in batch]:
                read.release()
        self._prepared = []


def _check_memory(wanted_bytes: int) -> None:
    """Refuse to stage what this machine cannot hold: the kernel would end the engine for it."""
    available = psutil.virtual_memory().available
    if wanted_bytes > available:
        raise UnsupportedError(
            f"staging needs {wanted_bytes / 2**30:.1f} GiB of memory on this rank and "
            f"{available / 2**30:.1f} are available; nothing was fetched",
            remedy="update with mode in_place",
        )


class _PreparedStep:
    """One step's reads: straight into place, and batches by way of the scratch area."""

    def __init__(
        self, *, reads: list[PreparedTransfer], batches: list[list[PreparedTransfer]]
    ) -> None:
        self.reads = reads
        self.batches = batches
