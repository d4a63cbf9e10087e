"""Running prepared transfers to their end, under a deadline of ours because the wires have none.

At the deadline nothing more is posted, and what is under way is given time to end: a healthy peer
ends it, and then the memory is whole again. Only what does not end then costs its buffer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine_plugins.errors import EnginePluginError, TransferTimeoutError, TransportError
from engine_plugins.weights.transport.base import Descriptors, PreparedTransfer

__all__ = ["DRAIN_S", "LARGEST_TRANSFER_BYTES", "run_transfers", "transfers_of"]

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 64
"""Transfers posted and not done. Keeps wires full, and what a failure must wait out short."""
LEAST_BYTES_IN_FLIGHT = 32 << 20
"""Of them together: more only if the wire has shown that it moves them in `IN_FLIGHT_S`."""
IN_FLIGHT_S = 0.5
LARGEST_TRANSFER_BYTES = 8 << 20
"""The most that one transfer should move: a wire says only of a whole one that it moved."""
MOST_DESCRIPTORS = 128
"""Of one transfer: NIXL looks at all that are under way each time it is asked. With the transfers
that are under way at once it bounds what waits in the wire."""
DRAIN_S = 2.0
"""How long transfers under way may take to end once no more are posted."""
SPIN_S = 100e-6
LONGEST_SLEEP_S = 0.3e-3
PATIENCE = 0.02
"""Of the time in which nothing moved, what may pass before it is seen to move again. Each look
takes the interpreter from the engine's own thread, and a pull that hangs must cost it nothing."""
LONGEST_HANGING_SLEEP_S = 0.1


def transfers_of(rows: Descriptors) -> list[Descriptors]:
    """Cut descriptors into those of single transfers: few enough, and of few enough bytes.

    Args:
        rows: [n, 3] uint64 (local address, remote address, bytes); long ones are cut too.
    """
    largest = np.uint64(LARGEST_TRANSFER_BYTES)
    pieces = -(-rows[:, 2].astype(np.int64) // LARGEST_TRANSFER_BYTES)
    if (pieces > 1).any():
        whole, rows = rows, np.repeat(rows, pieces, axis=0)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        offsets = (np.arange(len(rows)) - first).astype(np.uint64) * largest
        rows[:, :2] += offsets[:, None]
        rows[:, 2] = np.minimum(np.repeat(whole[:, 2], pieces) - offsets, largest)
    ends = np.cumsum(rows[:, 2])
    parts: list[Descriptors] = []
    begin = 0
    while begin < len(rows):
        before = ends[begin - 1] if begin else np.uint64(0)
        fit = int(np.searchsorted(ends, before + largest, side="right"))
        end = min(max(fit, begin + 1), begin + MOST_DESCRIPTORS)
        parts.append(rows[begin:end])
        begin = end
    return parts


def run_transfers(
    transfers: Sequence[PreparedTransfer],
    *,
    deadline_s: float,
    stall_timeout_s: float | None = None,
    drain_s: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> int:
    """Post every read and write and wait until all are done.

    Those of different peers take turns, so that every peer's link is used. When this returns or
    raises anything but a TransferTimeoutError that is `stuck`, nothing is under way; Ctrl-C is no
    exception, unless what was under way did not end. After a stuck one bytes may go on landing for
    as long as the processes live, releasing the transfers does not stop them: the caller must
    quarantine its buffer (`Arena.quarantine`), neither free nor reuse it, and must not post these
    transfers again. The same holds for the memory that a write was to fill, at the peer.

    Args:
        transfers: prepared, into disjoint targets; each at most once.
        deadline_s: no more is posted after so many seconds, however much has progressed.
        stall_timeout_s: nor once nothing has ended for so long; None never gives up for that.
        drain_s: how long what is under way may take to end then; None is `DRAIN_S`.
        on_progress: called in this thread after each transfer, with bytes done and bytes in all.
        cancelled: asked between transfers and while waiting; once true, what is under way may end
            and nothing more is posted.

    Returns:
        Bytes moved.

    Raises:
        PeerLostError: a peer died; the text says how many bytes had arrived.
        TransferTimeoutError: the deadline passed, or nothing moved for too long. It is `stuck`
            if transfers were still under way `drain_s` after that, after another one failed, or
            after the call was cancelled or interrupted.
        TransportError: a transfer failed for another reason, or the call was cancelled.
    """
    run = _Run(transfers, deadline_s, stall_timeout_s, on_progress, cancelled)
    drain_s = DRAIN_S if drain_s is None else drain_s
    try:
        run.wait(run.step)
    except TransportError as error:
        logger.warning(
            "%s stop after %d of %d bytes: %s", run.what, run.bytes_done, run.total, error
        )
        run.drain(error, drain_s)
        if isinstance(error, TransferTimeoutError):
            raise
        raise type(error)(
            f"{error.message}; {run.bytes_done} of {run.total} bytes had arrived",
            remedy=error.remedy,
        ) from error
    except BaseException as error:  # Ctrl-C: the caller will use its memory again
        run.drain(error, drain_s)
        raise
    return run.bytes_done


class _Run:
    """The transfers of one call: those waiting, those under way, and the bytes that are done."""

    def __init__(
        self,
        transfers: Sequence[PreparedTransfer],
        deadline_s: float,
        stall_timeout_s: float | None,
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        directions = {transfer.direction for transfer in transfers}
        self.what = f"{directions.pop()}s" if len(directions) == 1 else "transfers"
        self.total = sum(transfer.nbytes for transfer in transfers)
        self.bytes_done = 0
        self._waiting = deque(_take_turns(transfers))
        self._active: list[PreparedTransfer] = []
        self._bytes_active = 0
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._began = time.monotonic()
        self._deadline = self._began + deadline_s
        self._stall_timeout_s = stall_timeout_s

    def wait(self, step: Callable[[], bool]) -> None:
        """Call `step` until nothing is left, ever more rarely while nothing moves."""
        moved_at = time.monotonic()
        pause = 0.0
        while self._waiting or self._active:
            before = time.monotonic()
            if step():
                moved_at, pause = time.monotonic(), 0.0
                continue
            now = time.monotonic()
            if now >= self._deadline:
                raise self._timeout("which is past the deadline")
            if self._stall_timeout_s is not None and now - moved_at >= self._stall_timeout_s:
                raise self._timeout(f"the last of them {now - moved_at:.1f} s ago")
            if now - moved_at < SPIN_S:
                time.sleep(0)
                continue
            hanging = min(PATIENCE * (now - moved_at), LONGEST_HANGING_SLEEP_S)
            pause = min(max(2 * pause, SPIN_S / 2, now - before), max(LONGEST_SLEEP_S, hanging))
            time.sleep(min(pause, self._deadline - now))

    def step(self) -> bool:
        """Post what there is room for, look at what is under way; say whether anything ended."""
        moved = self._poll()
        while self._waiting and self._has_room():
            self._check_interrupted()
            self._post(self._waiting.popleft())
            # A wire that copies within post() is done already and takes no room.
            moved = self._poll(last=True) or moved
        if not moved:
            self._check_interrupted()
        return moved

    def drain(self, cause: BaseException, drain_s: float) -> None:
        """Let what is under way end, so that nothing writes to the buffer any more.

        Raises:
            TransferTimeoutError: it did not end in time, and is `stuck`.
        """
        self._waiting.clear()
        self._deadline, self._stall_timeout_s = time.monotonic() + drain_s, None
        try:
            self.wait(self._poll_any)
        except BaseException as error:  # a second Ctrl-C too: it ends the wait, not the transfers
            reason, then = (_said(each) for each in (cause, error))
            raise TransferTimeoutError(
                f"{reason}; then {then}; {len(self._active)} {self.what} are still under way and "
                "may move bytes later",
                remedy="never free or reuse the buffers at either end; check that the peer runs "
                "(it may be stopped or unreachable), or allow more time",
                stuck=True,
            ) from cause

    def _has_room(self) -> bool:
        """Whether another transfer may be posted; one always may."""
        if not self._active:
            return True
        bytes_per_s = self.bytes_done / (time.monotonic() - self._began + 1e-9)
        most = max(LEAST_BYTES_IN_FLIGHT, bytes_per_s * IN_FLIGHT_S)
        fits = self._bytes_active + self._waiting[0].nbytes <= most
        return fits and len(self._active) < MAX_IN_FLIGHT

    def _poll_any(self) -> bool:
        try:
            return self._poll()
        except TransportError as error:
            logger.debug("while the others end: %s", error)
            return True

    def _poll(self, *, last: bool = False) -> bool:
        """Look at what is under way (or was posted last); what failed leaves the list."""
        looked_at = self._active[-1:] if last else list(self._active)
        moved = False
        for transfer in looked_at:
            try:
                ended = transfer.done()
            except TransportError:
                self._remove(transfer)
                raise
            if ended:
                self._remove(transfer)
                self.bytes_done += transfer.nbytes
                moved = True
                if self._on_progress is not None:
                    self._on_progress(self.bytes_done, self.total)
        return moved

    def _post(self, transfer: PreparedTransfer) -> None:
        # Listed first: an interrupt that comes with the post must find it to drain it.
        self._active.append(transfer)
        self._bytes_active += transfer.nbytes
        try:
            transfer.post()
        except TransportError:
            self._remove(transfer)
            raise

    def _remove(self, transfer: PreparedTransfer) -> None:
        self._active.remove(transfer)
        self._bytes_active -= transfer.nbytes

    def _check_interrupted(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise TransportError(f"the {self.what} were cancelled", remedy="start the update again")
        if time.monotonic() >= self._deadline:
            raise self._timeout("which is past the deadline")

    def _timeout(self, why: str) -> TransferTimeoutError:
        slow = sorted({transfer.peer for transfer in [*self._active, *self._waiting]})
        named = ", ".join(slow[:8]) + (f" and {len(slow) - 8} more" if len(slow) > 8 else "")
        return TransferTimeoutError(
            f"{named}: {self.bytes_done} of {self.total} bytes arrived in "
            f"{time.monotonic() - self._began:.1f} s, {why}",
            remedy="check that the peer runs (it may be stopped or unreachable), or allow more "
            "time",
        )


def _take_turns(transfers: Sequence[PreparedTransfer]) -> list[PreparedTransfer]:
    """One of every peer, then the next one of every peer, each peer's in their order."""
    seen: dict[str, int] = {}
    turns = []
    for transfer in transfers:
        turns.append(seen.get(transfer.peer, 0))
        seen[transfer.peer] = turns[-1] + 1
    ordered = sorted(zip(turns, transfers, strict=True), key=lambda pair: pair[0])
    return [transfer for _, transfer in ordered]


def _said(error: BaseException) -> str:
    """What was seen: what to do is said once, of the error that is raised."""
    message = error.message if isinstance(error, EnginePluginError) else str(error)
    return message or type(error).__name__
