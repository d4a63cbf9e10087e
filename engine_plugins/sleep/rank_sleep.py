"""Sleep and wake on one engine rank: the calls that the admin side makes of a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine_plugins.errors import UnsupportedError
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_ledger import MemoryLedger

__all__ = ["LedgerView", "RankSleep"]


class LedgerView(msgspec.Struct, frozen=True, kw_only=True):
    """What of a rank can be released, and what is."""

    tp_rank: int
    tags: list[MemoryTag]
    released: list[MemoryTag]
    unreleased: dict[str, int]
    """Bytes of the released tags that stayed resident, by the reason why."""


class RankSleep:
    """Answers the admin side's sleep calls with one rank's ledger.

    Args:
        ledger: of this rank's memory; None where the engine has nothing to release it with.
        tp_rank: this rank, as errors will name it.
        before_release: lets go of what holds on to memory that is about to go (registrations,
            receive buffers); told whether the weights are among it, and whether they will be lost.
        why_not: says why there is no ledger.
    """

    def __init__(
        self,
        ledger: MemoryLedger | None,
        *,
        tp_rank: int,
        before_release: Callable[[bool, bool], None],
        why_not: str = "",
    ) -> None:
        self._ledger = ledger
        self._tp_rank = tp_rank
        self._before_release = before_release
        self._why_not = why_not

    @property
    def calls(self) -> Mapping[str, Callable[..., Any]]:
        """By the names that the admin side uses."""
        return {
            "ledger": self._view,
            "may_release": self._may_release,
            "release": self._release,
            "may_restore": self._may_restore,
            "restore": self._restore,
        }

    def _view(self) -> LedgerView:
        ledger = self._ledger
        return LedgerView(
            tp_rank=self._tp_rank,
            tags=[] if ledger is None else list(ledger.tags),
            released=[] if ledger is None else list(ledger.released),
            unreleased={} if ledger is None else ledger.unreleased(),
        )

    def _may_release(self, tags: Sequence[MemoryTag] | None) -> list[MemoryTag]:
        """The tags that a sleep would release: all, where none are named."""
        ledger = self._required()
        chosen = ledger.tags if tags is None else tags
        ledger.require_mapped(chosen)
        return list(chosen)

    def _release(self, tags: Sequence[MemoryTag], keep: bool) -> LedgerView:
        ledger = self._required()
        ledger.require_mapped(tags)
        weights = "weights" in tags
        self._before_release(weights, weights and not keep)
        ledger.release(tags, keep=keep)
        return self._view()

    def _may_restore(self, tags: Sequence[MemoryTag]) -> None:
        self._required().require_released(tags)

    def _restore(self, tags: Sequence[MemoryTag]) -> LedgerView:
        """Map the tags again, those among them that are released."""
        ledger = self._required()
        ledger.restore([tag for tag in tags if tag in ledger.released])
        return self._view()

    def _required(self) -> MemoryLedger:
        if self._ledger is None:
            raise UnsupportedError(
                f"rank {self._tp_rank} cannot release memory: {self._why_not}",
                remedy="start the engine with ENGINE_PLUGINS_SLEEP=true",
            )
        return self._ledger
