"""Bytes between the trainer's ranks, over gloo: no wait that a signal or a failure cannot end.

Whoever leaves tells why in the store, and cuts its connections: the others hear of it in what they
wait for, or within a look at the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from engine_plugins.errors import UpdateFailedError
from engine_plugins.sender.roll_call import Meeting, missing_ranks

__all__ = ["Buffer", "CutOffError", "RankWire"]

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

LOOK_S = 1.0
"""How often a rank that waits looks whether another has left."""
LOOKS_PER_S = 500
"""By all ranks together: the store is one process."""
LONGEST_S = 7200.0
"""Bound of gloo's own, above all of ours."""
TRANSFER_S, TRANSFER_BYTES_PER_S = 120.0, 10e6
"""For bytes between two ranks that are both there."""
_TAG = 1
_CUT_TAG = 2
_BROKEN = "broken"


class CutOffError(Exception):
    """Another rank has left, and told why.

    Attributes:
        told: what it left for the others.
    """

    def __init__(self, told: str) -> None:
        super().__init__("another rank left")
        self.told = told


class RankWire:
    """One meeting's group; every method but `leave` and `cut` is collective.

    Args:
        meeting: of the ranks.
        members: their global ranks, in the group's order.
        me: this process's global rank.
        warn_after_s: when a wait for others' steps is worth a warning.
    """

    def __init__(
        self, meeting: Meeting, members: Sequence[int], me: int, *, warn_after_s: float
    ) -> None:
        self._group, self._store = meeting.group, meeting.store
        self._group.set_timeout(timedelta(seconds=LONGEST_S))
        self._members, self._me = list(members), me
        self._place = self._members.index(me)
        self._warn_after_s = warn_after_s
        self._look_s = max(LOOK_S, len(self._members) / LOOKS_PER_S)
        self._calls = 0

    def sizes(self, mine: int, *, wait_s: float, steps: bool = False) -> list[int]:
        """Every rank's number.

        Args:
            mine: this rank's.
            wait_s: for the others to come.
            steps: whether the others may compute meanwhile: then who is late is warned about.
        """
        parts = [torch.zeros(1, dtype=torch.int64) for _ in self._members]
        work = self._post(self._group.allgather, [parts], [torch.tensor([mine])])
        self._wait(work, wait_s, steps=steps)
        return [int(part) for part in parts]

    def all_gather(self, mine: Buffer, *, wait_s: float, steps: bool = False) -> list[Buffer]:
        """Every rank's bytes, on every rank: for what is small."""
        sizes = self.sizes(len(mine), wait_s=wait_s, steps=steps)
        longest = max(sizes)
        if not longest:
            return [b""] * len(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = _tensor(mine)
        parts = [torch.empty_like(padded) for _ in self._members]
        self._wait(self._post(self._group.allgather, [parts], [padded]), wait_s)
        return [part[:size].numpy().data for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, mine: Buffer, *, wait_s: float) -> Buffer:
        """The leading rank's bytes; what the others give is not looked at."""
        size = torch.tensor([len(mine)])
        self._wait(self._post(self._group.broadcast, size, 0), wait_s)
        if not int(size):
            return b""
        data = _tensor(mine) if self.leads else torch.empty(int(size), dtype=torch.uint8)
        self._wait(self._post(self._group.broadcast, data, 0), wait_s)
        return data.numpy().data

    def send_to_each(self, parts: Sequence[Buffer], sizes: Sequence[int]) -> Buffer:
        """Give each rank its own bytes of the leading rank's.

        Args:
            parts: one for each rank; of the other ranks', nothing is looked at.
            sizes: how long each is, known to all.
        """
        if self.leads:
            works = [
                self._post(self._group.send, [_tensor(part)], to, _TAG)
                for to, part in enumerate(parts)
                if to and len(part)
            ]
            for work in works:
                self._transfer(work, sum(sizes))
            return parts[0]
        data = torch.empty(sizes[self._place], dtype=torch.uint8)
        if len(data):
            # As long as it takes for those before us, too.
            self._transfer(self._post(self._group.recv, [data], 0, _TAG), sum(sizes))
        return data.numpy().data

    def to_leader(self, mine: Buffer, sizes: Mapping[int, int]) -> dict[int, Buffer]:
        """Give the leading rank the bytes of some ranks, by their places in the group.

        Args:
            mine: this rank's.
            sizes: how long those of each are, known to all; others send nothing.
        """
        if not self.leads:
            if sizes.get(self._place):
                data = _tensor(mine)
                self._transfer(self._post(self._group.send, [data], 0, _TAG), len(data))
            return {}
        got: dict[int, Buffer] = {}
        for place, size in sizes.items():
            if place and size:
                data = torch.empty(size, dtype=torch.uint8)
                work = self._post(self._group.recv, [data], place, _TAG)
                self._transfer(work, size)
                got[place] = data.numpy().data
            else:
                got[place] = mine if size else b""
        return got

    @property
    def leads(self) -> bool:
        """Whether this is the leading rank."""
        return self._place == 0

    def leave(self, why: str) -> None:
        """Tell the others why this rank does not go on, whatever they wait for. Never raises."""
        with suppress(RuntimeError):
            self._store.set(_BROKEN, why)
        self.cut()

    def cut(self) -> None:
        """Close the connections: waits of this rank and of its neighbours end with an error.

        gloo has no call for it, and does it after a wait that timed out.
        """
        other = 0 if self._place else 1
        with suppress(RuntimeError):
            hopeless = self._group.recv([torch.empty(1, dtype=torch.uint8)], other, _CUT_TAG)
            hopeless.wait(timedelta(milliseconds=1))

    def _post(self, post: Callable[..., dist.Work], *what: object) -> dist.Work:
        try:
            return post(*what)
        except RuntimeError as error:
            self._lost(error)

    def _transfer(self, work: dist.Work, nbytes: int) -> None:
        """Between two ranks that are there; gloo cannot look away from these and go on."""
        try:
            work.wait(timedelta(seconds=TRANSFER_S + nbytes / TRANSFER_BYTES_PER_S))
        except RuntimeError as error:
            self._lost(error)

    def _wait(self, work: dist.Work, wait_s: float, *, steps: bool = False) -> None:
        began = time.monotonic()
        self._calls += 1
        warned = False
        while True:
            try:
                work.wait(timedelta(seconds=self._look_s))
                return
            except RuntimeError as error:
                if work.is_completed():
                    self._end_of(work, error)
                    return
            waited = time.monotonic() - began
            self._look()
            if waited >= wait_s:
                raise missing_ranks(
                    self._absent(),
                    len(self._members),
                    me=self._me,
                    wait_s=wait_s,
                    what="did not come to what the others had begun",
                )
            if steps and waited >= self._warn_after_s + self._look_s and not warned:
                warned = True
                logger.warning(
                    "trainer rank %d has waited %.0f s for ranks %s to come to the update too, "
                    "and goes on waiting for at most %.0f s",
                    self._me,
                    waited,
                    self._absent()[:16],
                    wait_s,
                )

    def _end_of(self, work: dist.Work, error: RuntimeError) -> None:
        """It ended between our wait and our look, or it failed."""
        try:
            work.wait()
        except RuntimeError:
            self._lost(error)

    def _look(self) -> None:
        """Say that we wait here, and see whether somebody has left.

        Raises:
            CutOffError: a rank has.
        """
        with suppress(RuntimeError):
            self._store.set(f"at/{self._me}", str(self._calls))
        told = self._told()
        if told is not None:
            self.cut()
            raise CutOffError(told)

    def _absent(self) -> list[int]:
        """Global ranks that do not wait for what this one waits for."""
        absent = []
        for rank in self._members:
            at = b"0"
            with suppress(RuntimeError):
                key = f"at/{rank}"
                at = self._store.get(key) if self._store.check([key]) else b"0"
            if int(at) < self._calls:
                absent.append(rank)
        return absent

    def _told(self) -> str | None:
        with suppress(RuntimeError):
            if self._store.check([_BROKEN]):
                return str(self._store.get(_BROKEN), "utf-8")
        return None

    def _lost(self, error: RuntimeError) -> NoReturn:
        """A connection broke: by a rank that left, or that died."""
        self.cut()  # so that those who wait for us hear of it too
        told = self._told()
        if told is not None:
            raise CutOffError(told) from error
        raise UpdateFailedError(
            f"trainer rank {self._me} lost the other trainer ranks: {error}",
            remedy="look for the rank that ended first; its own error is the cause",
        ) from error


def _tensor(data: Buffer) -> torch.Tensor:
    """[n] uint8; what cannot be written to is copied."""
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    mine = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(mine, dtype=torch.uint8)
