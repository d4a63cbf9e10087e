"""What ranks tell the scheduler that decides for them: memory in use, and peaks of their steps.

A scheduler in the rank's own process asks its meter. One in another process reads pages that the
ranks' meters keep, and goes by the rank with the least room.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from engine_plugins.prefill_gate.memory_cap import MemoryFigures, Reading
from engine_plugins.prefill_gate.step_memory import StepMemory
from engine_plugins.shared_page import SharedPage

__all__ = ["Measured", "OwnRank", "PagedRanks", "RankMeter", "Ranks", "StepOrder", "rank_page"]

KEPT_PEAKS = 8
IDLE_REFRESH_S = 0.5
"""How old a page gets while a rank has nothing to do."""
_PAGE_BYTES = 16 << 10


class StepOrder(NamedTuple):
    """What a rank is asked to do about one step."""

    number: int
    measure: bool
    give_back: bool


class Measured(NamedTuple):
    """A step's peak over what was in use before it."""

    number: int
    peak_bytes: int


class _Page(msgspec.Struct, frozen=True, kw_only=True):
    figures: MemoryFigures
    measured: list[Measured]


class Ranks(Protocol):
    """The ranks of an engine, as its scheduler sees them."""

    def reading(self, configured_cap: int | None) -> Reading:
        """Of the rank with the least room."""
        ...

    def measured(self) -> list[Measured]:
        """Steps that all ranks have measured since the last time, each with its largest peak."""
        ...

    def device_bytes(self) -> int | None:
        """Size of the smallest of their GPUs; `None` for ranks on the host."""
        ...


class RankMeter:
    """One rank's: follows orders around its steps.

    Args:
        memory: of the rank.
        page: for a scheduler in another process.
    """

    def __init__(self, memory: StepMemory, page: Path | None = None) -> None:
        self.memory = memory
        self.peaks: deque[Measured] = deque(maxlen=KEPT_PEAKS)
        self._order: StepOrder | None = None
        self._page: SharedPage | None = None
        self._publishing = threading.Lock()
        if page is not None:
            SharedPage.create(page, nbytes=_PAGE_BYTES)
            self._page = SharedPage(page)
            self._publish()
            threading.Thread(target=self._refresh, name="prefill-gate", daemon=True).start()

    def before(self, order: StepOrder) -> None:
        """A step is about to run."""
        if order.give_back:
            self.memory.give_back()
        with self._publishing:
            self._order = order
        if order.measure:
            self.memory.start()

    def after(self, *, completed: bool = True) -> None:
        """It has run, or failed on the way; without a step before this does nothing."""
        order = self._order
        if order is None:
            return
        if order.measure and completed:
            peak = self.memory.peak_bytes()
            if peak >= 0:
                self.peaks.append(Measured(order.number, peak))
        self._order = None
        if self._page is not None:
            self._publish()

    def _refresh(self) -> None:
        """An idle rank's figures change too: others take and free memory."""
        waiting = threading.Event()
        while not waiting.wait(IDLE_REFRESH_S):
            self._publish()

    def _publish(self) -> None:
        with self._publishing:
            if self._page is not None and self._order is None:
                page = _Page(figures=self.memory.figures(), measured=list(self.peaks))
                self._page.write(msgspec.msgpack.encode(page))


class OwnRank:
    """The one rank of a scheduler that runs in its process."""

    def __init__(self, meter: RankMeter) -> None:
        self._meter = meter

    def reading(self, configured_cap: int | None) -> Reading:
        """As of now."""
        return self._meter.memory.figures().reading(configured_cap)

    def device_bytes(self) -> int | None:
        """Of its GPU."""
        return self._meter.memory.figures().device_bytes

    def measured(self) -> list[Measured]:
        """Since the last time."""
        found = list(self._meter.peaks)
        self._meter.peaks.clear()
        return found


class PagedRanks:
    """Ranks in processes of their own.

    Args:
        pages: of every rank; they have to be there.
    """

    def __init__(self, pages: Sequence[Path]) -> None:
        self._pages = [SharedPage(page) for page in pages]
        self._newest: list[_Page] = []
        self._sequences: list[int] = []
        self._told = -1

    def reading(self, configured_cap: int | None) -> Reading:
        """As each rank last said, between two of its steps."""
        self._look()
        readings = (page.figures.reading(configured_cap) for page in self._newest)
        return min(readings, key=lambda each: each.headroom_bytes)

    def device_bytes(self) -> int | None:
        """Of the rank whose GPU is smallest."""
        self._look()
        sizes = [page.figures.device_bytes for page in self._newest]
        return min((size for size in sizes if size is not None), default=None)

    def measured(self) -> list[Measured]:
        """Those that have come to be on the page of every rank."""
        self._look()
        peaks = [
            {number: peak for number, peak in page.measured if number > self._told}
            for page in self._newest
        ]
        common = sorted(set.intersection(*map(set, peaks)))
        self._told = common[-1] if common else self._told
        return [Measured(each, max(peak[each] for peak in peaks)) for each in common]

    def _look(self) -> None:
        sequences = [page.sequence for page in self._pages]
        if sequences != self._sequences:
            self._newest = [
                msgspec.msgpack.decode(page.read()[1], type=_Page) for page in self._pages
            ]
            self._sequences = sequences


def rank_page(runtime_dir: Path, rank: int) -> Path:
    """Where the meter of a rank keeps its page."""
    return runtime_dir / "gate" / f"rank{rank}.page"
