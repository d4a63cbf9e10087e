"""What became of a row, and whether that is as it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos_update.acts import Verdicts
from tests.liveness.rows import Row

__all__ = ["GONE_S", "TOLD_S", "TRUE_S", "Result"]

TOLD_S, TRUE_S = 5.0, 10.0
"""Beyond `timeout_s`: until the trainer is told, until /state is true."""
GONE_S = 10.0
"""Until a server has ended of which a process was killed."""

AT_ONCE_S = 20.0
"""What a new trainer's update may take where a dead one has prepared another."""
STARVED = ("disk_full", "no_descriptors", "folder_deleted", "no_room_to_sleep")
"""Faults that touch no weights."""


@dataclass(kw_only=True)
class Result(Verdicts):
    """What was seen. Seconds count from the moment the state was made; None: never.

    Attributes:
        row: which.
        tries: updates in which the phase was looked for.
        reached: whether the witness saw the phase; only then the row counts.
        told_s: until the trainer had control back.
        told: what it was told.
        named: whether that or /state names the culprit; None where nobody failed, or the
            server had ended before it could say so.
        state: what /state said last, before the cause was taken away.
        true_s: until /state was true.
        door_s: until requests were answered or refused, no longer held.
        late: whether an update that was told to have failed was published later.
        gone_s: until all processes of the server had ended.
        ended: the server's exit status.
        repaired_s: what a good update took, and right answers after it.
        for_good: whether only a restart would help.
        unfinished: files that were begun and never completed.
        left: what was left of the server.
        took_s: all of it, and the start of a server.
    """

    row: Row
    tries: int = 0
    reached: bool = False
    told_s: float | None = None
    told: str = ""
    named: bool | None = None
    state: str = ""
    true_s: float | None = None
    door_s: float | None = None
    late: bool = False
    gone_s: float | None = None
    ended: int | None = None
    repaired_s: float | None = None
    for_good: bool = False
    unfinished: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether all held that must hold."""
        return not list(self.violations())

    def violations(self) -> Iterator[str]:
        """What did not."""
        row = self.row
        if not self.reached:
            yield "the phase was not reached"
            return
        if row.tells:
            if self.told_s is None or self.told_s > row.timeout_s + TOLD_S:
                yield "told late" if self.told_s else "not told"
            if self.named is False:
                yield "the culprit is not named"
        if row.ends_server and (self.gone_s is None or self.gone_s > GONE_S):
            yield f"the server had not ended after {GONE_S:g} s"
        if self.gone_s is None:
            yield from self._violations_of_the_living()
        elif not row.ends_server:
            yield "the server has ended"
        if self.wrong or self.lying:
            yield f"{self.wrong} wrong and {self.lying} lying answers"
        if self.left:
            yield f"left: {', '.join(self.left)}"

    def _violations_of_the_living(self) -> Iterator[str]:
        limit = self.row.timeout_s + TRUE_S
        at_once = self.row.phase == "prepared" and self.row.fault == "trainer_killed"
        if not at_once:
            if self.true_s is None or self.true_s > limit:
                yield "/state not true in time"
            holds = self.state in ("asleep", "paused")  # so requests rightly wait
            if not holds and (self.door_s is None or self.door_s > limit):
                yield "requests held for too long"
        if self.late:
            yield "published after it was told to have failed"
        starved = self.row.fault in (
            "disk_full",
            "no_descriptors",
            "folder_deleted",
            "no_room_to_sleep",
        )
        if starved and self.state == "fenced" and self.row.phase != "install":
            yield "fenced although nothing was touched"
        if self.unfinished:
            yield f"unfinished files: {', '.join(self.unfinished)}"
        if not self.row.ends_server and self.repaired_s is None:
            yield "only a restart helps" if self.for_good else "not repaired"
        elif at_once and self.repaired_s is not None and self.repaired_s > AT_ONCE_S:
            yield "others were kept out"
