"""Running prepared transfers to their end, under a deadline of ours because the wires have none."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from engine_plugins.errors import TransferTimeoutError, TransportError
from engine_plugins.weights.transport.base import PreparedTransfer

__all__ = ["run_transfers"]

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 64
"""Transfers posted and not done. Keeps wires full, and what a failure must wait out short."""
DRAIN_S = 3.0
"""How long transfers under way may take to end after another one failed or was cancelled."""
SPIN_S = 100e-6
LONGEST_SLEEP_S = 0.3e-3


def run_transfers(
    transfers: Sequence[PreparedTransfer],
    *,
    deadline_s: float,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> int:
    """Post every read and write and wait until all are done.

    Those of different peers take turns, so that every peer's link is used. When this returns or
    raises anything but TransferTimeoutError, nothing is under way. After a TransferTimeoutError
    bytes may go on landing for as long as the processes live, releasing the transfers does not
    stop them: the caller must quarantine its buffer (`Arena.quarantine`), neither free nor reuse
    it, and must not post these transfers again. The same holds for the memory that a write was
    to fill, at the peer.

    Args:
        transfers: prepared, into disjoint targets; each at most once.
        deadline_s: limit on the whole call in seconds, however much has progressed.
        on_progress: called in this thread after each transfer, with bytes done and bytes in all.
        cancelled: asked between transfers and while waiting; once true, what is under way may end
            and nothing more is posted.

    Returns:
        Bytes moved.

    Raises:
        PeerLostError: a peer died; the text says how many bytes had arrived.
        TransferTimeoutError: the deadline passed, or transfers were still under way `DRAIN_S`
            after another one failed or the call was cancelled.
        TransportError: a transfer failed for another reason, or the call was cancelled.
    """
    run = _Run(transfers, deadline_s, on_progress, cancelled)
    try:
        run.wait(run.step)
    except TransferTimeoutError:
        raise
    except TransportError as error:
        logger.warning(
            "%s stop after %d of %d bytes: %s", run.what, run.bytes_done, run.total, error
        )
        run.drain(error)
        raise type(error)(
            f"{error}; {run.bytes_done} of {run.total} bytes had arrived", remedy=error.remedy
        ) from error
    return run.bytes_done


class _Run:
    """The transfers of one call: those waiting, those under way, and the bytes that are done."""

    def __init__(
        self,
        transfers: Sequence[PreparedTransfer],
        deadline_s: float,
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        directions = {transfer.direction for transfer in transfers}
        self.what = f"{directions.pop()}s" if len(directions) == 1 else "transfers"
        self.total = sum(transfer.nbytes for transfer in transfers)
        self.bytes_done = 0
        self._waiting = deque(_take_turns(transfers))
        self._active: list[PreparedTransfer] = []
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._began = time.monotonic()
        self._deadline = self._began + deadline_s

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
                raise self._timeout()
            if now - moved_at < SPIN_S:
                time.sleep(0)
                continue
            pause = min(max(2 * pause, SPIN_S / 2, now - before), LONGEST_SLEEP_S)
            time.sleep(min(pause, self._deadline - now))

    def step(self) -> bool:
        """Post what there is room for, look at what is under way; say whether anything ended."""
        moved = self._poll()
        while self._waiting and len(self._active) < MAX_IN_FLIGHT:
            self._check_interrupted()
            transfer = self._waiting.popleft()
            transfer.post()
            # A wire that copies within post() is done already and takes no room.
            self._active.append(transfer)
            moved = self._poll(last=True) or moved
        if not moved:
            self._check_interrupted()
        return moved

    def drain(self, cause: TransportError) -> None:
        """Let what is under way end, so that nothing writes to the buffer any more.

        Raises:
            TransferTimeoutError: it did not end in time.
        """
        self._waiting.clear()
        self._deadline = time.monotonic() + DRAIN_S
        try:
            self.wait(self._poll_any)
        except TransferTimeoutError as error:
            raise TransferTimeoutError(f"{cause}; then {error}", remedy=error.remedy) from cause

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
                self._active.remove(transfer)
                raise
            if ended:
                self._active.remove(transfer)
                self.bytes_done += transfer.nbytes
                moved = True
                if self._on_progress is not None:
                    self._on_progress(self.bytes_done, self.total)
        return moved

    def _check_interrupted(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise TransportError(f"the {self.what} were cancelled", remedy="start the update again")
        if time.monotonic() >= self._deadline:
            raise self._timeout()

    def _timeout(self) -> TransferTimeoutError:
        slow = sorted({transfer.peer for transfer in [*self._active, *self._waiting]})
        named = ", ".join(slow[:8]) + (f" and {len(slow) - 8} more" if len(slow) > 8 else "")
        return TransferTimeoutError(
            f"{named}: {self.bytes_done} of {self.total} bytes arrived in "
            f"{time.monotonic() - self._began:.1f} s, which is past the deadline; "
            f"{len(self._active)} {self.what} are still under way and may move bytes later",
            remedy="never free or reuse the buffers at either end; check that the peer runs (it "
            "may be stopped or unreachable), or allow more time",
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
