"""Sleep and wake on one engine rank: the calls that the admin side makes of a worker."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from engine_plugins.errors import UnsupportedError
from engine_plugins.sleep.gpu_device import free_bytes
from engine_plugins.sleep.memory_backend import MEMORY_TAGS, MemoryTag
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.memory_report import GpuDevice, RankMemoryRow
from engine_plugins.sleep.rank_memory import RankMemory

__all__ = ["LedgerView", "RankSleep", "Room", "WeightHolder"]


class WeightHolder(Protocol):
    """What holds on to a rank's live weights besides the engine (`weights.receiver`)."""

    def let_go(self, *, lost: bool) -> None:
        """Hold on to nothing: the weights' memory goes, and `lost` says their values too."""
        ...

    @property
    def quarantined_bytes(self) -> int:
        """Host memory that broken updates have lost for now."""
        ...


class LedgerView(msgspec.Struct, frozen=True, kw_only=True):
    """What is released of a rank."""

    tp_rank: int
    released: list[MemoryTag]
    broken: list[MemoryTag]
    """Tags of which a call failed half way: only a restart helps."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """Whether what a wake maps would fit; ranks of one device share what is free there."""

    device: str
    """A GPU's uuid, or the name of a host."""
    needed_bytes: int
    free_bytes: int


class RankSleep:
    """Answers the admin side's sleep calls for one rank.

    Args:
        ledger: of this rank's memory; None where the engine was started with nothing to release it
            with.
        memory: measures this rank.
        weights: lets go of the weights before they are released.
        sizes: bytes of each tag that lie in memory while it is mapped.
        free: bytes that the rank could map now.
    """

    def __init__(
        self,
        ledger: MemoryLedger | None,
        memory: RankMemory,
        weights: WeightHolder,
        *,
        sizes: Callable[[MemoryTag], int] = lambda tag: 0,
        free: Callable[[GpuDevice | None], int] = free_bytes,
    ) -> None:
        self._ledger = ledger
        self._memory = memory
        self._weights = weights
        self._sizes = sizes
        self._free = free

    @property
    def calls(self) -> Mapping[str, Callable[..., Any]]:
        """By the names that the admin side uses."""
        return {
            "may_release": self._may_release,
            "release": self._release,
            "room": self._room,
            "restore": self._restore,
            "ledger": self._view,
            "memory": self._measure,
        }

    def _may_release(self, tags: Sequence[MemoryTag] | None) -> list[MemoryTag]:
        """What a sleep has still to release, of all tags where none are named."""
        ledger = self._required()
        return ledger.mapped(ledger.tags if tags is None else tags)

    def _release(self, tags: Sequence[MemoryTag], keep: bool) -> RankMemoryRow:
        """Release those of the tags that are mapped; the row is of when memory had come to rest."""
        ledger = self._required()
        left = ledger.mapped(tags)
        if left:
            # What an update left behind stays with no sleeper, and no device may read what goes.
            self._weights.let_go(lost="weights" in left and not keep)
            ledger.release(left, keep=keep)
        return self._row(settle=True)

    def _room(self, tags: Sequence[MemoryTag]) -> Room:
        """For those of the tags that are released."""
        device = self._memory.device
        return Room(
            device=socket.gethostname() if device is None else device.uuid,
            needed_bytes=sum(self._sizes(tag) for tag in tags if tag in self._released),
            free_bytes=self._free(device),
        )

    def _restore(self, tags: Sequence[MemoryTag]) -> LedgerView:
        """Map those of the tags that are released."""
        ledger = self._required()
        ledger.restore([tag for tag in tags if tag in ledger.released])
        return self._view()

    def _view(self) -> LedgerView:
        ledger = self._ledger
        return LedgerView(
            tp_rank=self._memory.tp_rank,
            released=[] if ledger is None else list(ledger.released),
            broken=[] if ledger is None else list(ledger.broken),
        )

    def _measure(self) -> RankMemoryRow:
        return self._row(settle=False)

    def _row(self, *, settle: bool) -> RankMemoryRow:
        memory = self._memory
        mapped: dict[str, int] = {
            tag: self._sizes(tag) for tag in MEMORY_TAGS if tag not in self._released
        }
        stays = {} if self._ledger is None else self._ledger.unreleased()
        # Of a GPU somebody waits for all that can be released; a host's packed weights just stay.
        kept = {**mapped, **(stays if memory.device is None else {})}
        return memory.row(
            memory.settled() if settle else memory.sample(),
            kept_bytes=sum(kept.values()),
            components={name: size for name, size in {**mapped, **stays}.items() if size},
            quarantined_bytes=self._weights.quarantined_bytes,
        )

    @property
    def _released(self) -> Sequence[MemoryTag]:
        return () if self._ledger is None else self._ledger.released

    def _required(self) -> MemoryLedger:
        if self._ledger is None:
            raise UnsupportedError(
                f"rank {self._memory.tp_rank} has nothing to release its memory with",
                remedy="start the engine with ENGINE_PLUGINS_SLEEP=true",
            )
        return self._ledger
