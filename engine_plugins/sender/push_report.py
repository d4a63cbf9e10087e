"""What the writes of a push took, rank by rank; measured by those who write."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["PushReport", "WriteCost"]


class WriteCost(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer rank's writes of one push, to all engines."""

    bytes: int = 0
    writes: int = 0
    """Transfers posted."""
    ranges: int = 0
    """Ranges of memory in them."""
    gathered: int = 0
    """Small pieces that were copied beside each other first."""
    gathered_s: float = 0.0
    """Seconds for these copies."""
    posted_s: float = 0.0
    """Seconds within posts; wires that copy there spend nearly all of their time so."""
    waited_s: float = 0.0
    """Seconds from the first post until every byte was there, posts left out."""

    @property
    def wire_s(self) -> float:
        """Seconds from the first post until every byte was there."""
        return self.posted_s + self.waited_s


class PushReport(msgspec.Struct, frozen=True, kw_only=True):
    """The writes of all trainer ranks, in their order."""

    ranks: list[WriteCost]

    @classmethod
    def of(cls, ranks: Sequence[WriteCost]) -> PushReport | None:
        """The report of a push; None where nothing was pushed."""
        return cls(ranks=list(ranks)) if ranks else None

    @property
    def bytes(self) -> int:
        """Bytes written by all ranks."""
        return sum(rank.bytes for rank in self.ranks)

    @property
    def slowest(self) -> WriteCost:
        """The rank that was longest on the wire."""
        return max(self.ranks, key=lambda rank: rank.wire_s)

    @property
    def gbps(self) -> float:
        """Gigabytes (1e9 bytes) per second on the wire, all ranks together."""
        return self.bytes / max(self.slowest.wire_s, 1e-9) / 1e9

    def __str__(self) -> str:
        slow = self.slowest
        return (
            f"{self.bytes / 1e6:.1f} MB written by {len(self.ranks)} "
            f"rank{'s' if len(self.ranks) != 1 else ''} at {self.gbps:.3g} GB/s on the wire "
            f"({sum(rank.writes for rank in self.ranks)} writes; the slowest rank gathered "
            f"{slow.gathered_s:.2f} s, posted {slow.posted_s:.2f} s, waited {slow.waited_s:.2f} s)"
        )
