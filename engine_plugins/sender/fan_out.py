"""Which engine feeds which in one update: a tree over the engines, mended when one fails.

The trainer feeds the root, and every engine that holds the version feeds up to `arity` others. The
tree is the same in every update, so that plans are kept; an engine whose place in it is gone is
given to the nearest engine above it that holds the version, then to any other, then to the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

__all__ = ["TRAINER", "FanOutTree"]

TRAINER = "trainer"
"""Feeds what no engine can feed; stands where an engine's url does."""

_Status = Literal["waiting", "reading", "holds", "failed"]


class FanOutTree:
    """Who feeds whom, and who could; knows nothing of wires.

    No engine is read by more than `arity` at a time, and none is given twice to the same one.

    Args:
        engines: urls; the first is the root, and the engine at place i reads from the engine at
            place (i - 1) // arity.
        arity: how many engines may read from one at a time, at least 1.
    """

    def __init__(self, engines: Sequence[str], arity: int) -> None:
        self._engines = list(engines)
        self._arity = arity
        self._status: dict[str, _Status] = dict.fromkeys(self._engines, "waiting")
        self._retired: set[str] = set()
        self._tried: dict[str, set[str]] = {engine: set() for engine in self._engines}
        self.fed_by: dict[str, str] = {}
        """By engine, who it reads or has read from: an engine's url, or `TRAINER`."""

    def waiting(self) -> list[str]:
        """Engines that nobody feeds yet."""
        return [engine for engine in self._engines if self._status[engine] == "waiting"]

    def roots(self) -> list[str]:
        """Engines that the trainer has to feed, once nothing is under way and nobody can.

        While no engine holds the version, the first: it will feed the others. Where engines hold it
        and cannot feed those that wait, all of these.
        """
        waiting = self.waiting()
        return waiting if "holds" in self._status.values() else waiting[:1]

    def next_feed(self) -> tuple[str, str] | None:
        """Begin the next feed between engines that can begin now: who reads, and from whom."""
        for engine in self.waiting():
            feeder = self._feeder_of(engine)
            if feeder is not None:
                self.begin(engine, feeder)
                return engine, feeder
        return None

    def begin(self, engine: str, feeder: str) -> None:
        """An engine reads from another, or from `TRAINER`."""
        self._status[engine] = "reading"
        self.fed_by[engine] = feeder

    def installed(self, engine: str) -> None:
        """An engine holds the version, and can feed others."""
        self._status[engine] = "holds"

    def try_another(self, engine: str) -> None:
        """An engine could not read from the one that it was given; it waits for another."""
        self._tried[engine].add(self.fed_by.pop(engine))
        self._status[engine] = "waiting"

    def failed(self, engine: str) -> None:
        """An engine is out: it refused the version, or is gone with it."""
        self._status[engine] = "failed"

    def retire(self, engine: str) -> None:
        """An engine holds the version and cannot feed others."""
        self._retired.add(engine)

    def _feeder_of(self, engine: str) -> str | None:
        above = list(self._above(engine))
        if above and self._status[above[0]] in ("waiting", "reading"):
            return None  # its own place in the tree is on its way
        for feeder in dict.fromkeys([*above, *self._engines]):
            if self._can_feed(feeder) and feeder not in self._tried[engine]:
                return feeder
        return None

    def _above(self, engine: str) -> Iterator[str]:
        """The engines between one and the root, nearest first."""
        place = self._engines.index(engine)
        while place:
            place = (place - 1) // self._arity
            yield self._engines[place]

    def _can_feed(self, feeder: str) -> bool:
        if self._status[feeder] != "holds" or feeder in self._retired:
            return False
        given = [engine for engine, feeds in self.fed_by.items() if feeds == feeder]
        return sum(self._status[engine] == "reading" for engine in given) < self._arity
