"""What ranks tell the scheduler that decides for them: memory in use, and peaks of their steps.

A scheduler in the rank's own process asks its meter. One in another process reads pages that the
ranks' meters keep, and goes by the rank with the least room.
"""

from __future__ import annotations

import functools
import itertools
import logging
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from engine_plugins.prefill_gate.memory_cap import MemoryFigures, Reading
from engine_plugins.prefill_gate.step_memory import LOOK_LASTS_S, StepMemory
from engine_plugins.shared_page import SharedPage

__all__ = ["Measured", "OwnRank", "PagedRanks", "RankMeter", "Ranks", "StepOrder", "rank_page"]

KEPT_PEAKS = 8
LOOK_S = 0.5
"""How old it gets what is known of a rank's memory, but for what a step changes."""
TRIES_TO_PUBLISH = 8
"""Ends of steps after each of which the next may have begun already."""
NO_ROOM = -1
_PAGE_BYTES = 1 << 10
_NONE = -1

logger = logging.getLogger(__name__)


class StepOrder(NamedTuple):
    """What a rank is asked to do about one step."""

    number: int
    measure: bool
    give_back: bool


class Measured(NamedTuple):
    """A step's peak over what was in use before it."""

    number: int
    peak_bytes: int


class _Page(NamedTuple):
    """What a meter says. It is read between steps, so it is as quick to read as can be."""

    figures: MemoryFigures
    measured: list[Measured]

    def encode(self) -> bytes:
        figures = [_NONE if each is None else each for each in self.figures]
        peaks = itertools.chain.from_iterable(self.measured)
        return _numbers(len(figures) + 2 * len(self.measured)).pack(*figures, *peaks)

    @classmethod
    def decode(cls, body: bytes) -> _Page:
        used, cap, addresses, limit, device, *peaks = _numbers(len(body) // 8).unpack(body)
        figures = MemoryFigures(
            used,
            cap,
            addresses,
            None if limit == _NONE else limit,
            None if device == _NONE else device,
        )
        return cls(figures, list(map(Measured, peaks[::2], peaks[1::2])))


class _Look(NamedTuple):
    """What can be had roughly, as numbers that can be read one by one; `at` in nanoseconds."""

    used_bytes: int
    cap_bytes: int
    address_room: int
    at: int

    @classmethod
    def now(cls, figures: MemoryFigures) -> _Look:
        return cls(figures.used_bytes, figures.cap_bytes, figures.address_room, time.monotonic_ns())

    def show(self, gauges: memoryview) -> None:
        """Put it on a page, the time first: an old look is no look."""
        for place in (3, 0, 1, 2):
            gauges[place] = self[place]

    def room(self, configured_cap: int | None) -> int:
        used, cap, address_room, at = self
        if time.monotonic_ns() - at > LOOK_LASTS_S * 1e9:
            return NO_ROOM
        return min((cap if configured_cap is None else configured_cap) - used, address_room)


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

    def room(self, configured_cap: int | None) -> int:
        """Headroom of the rank with the least, as of each one's last look: quick and rough.

        A look may fall into a step, and what that takes for a while counts as used. Less than 0
        where somebody has not looked for a while.
        """
        ...


class RankMeter:
    """One rank's: follows orders around its steps, and looks at memory now and then.

    What a page says a rank holds is read between two of its steps: within one it would be what the
    step takes. A scheduler in this process reads that itself, and for it a look need wait for
    nothing: to be told of the end of a step costs that step 40 microseconds.

    Args:
        memory: of the rank.
        page: for a scheduler in another process.

    Attributes:
        step: that runs, or `None`. One of which nothing is to be done is only put here and taken
            away again: between two steps a call costs a microsecond.
        is_due: whether `after` has to be called at the end of a step all the same.
    """

    def __init__(self, memory: StepMemory, page: Path | None = None) -> None:
        self.memory = memory
        self.peaks: deque[Measured] = deque(maxlen=KEPT_PEAKS)
        self.looked = _Look.now(memory.figures())
        self.step: object = None
        self.is_due = True  # the first step begins the looks
        self._order: StepOrder | None = None
        self._looks = False
        self._ended = threading.Lock()
        """Held by the looking thread from when it waits for the end of a step until that comes."""
        self._page: SharedPage | None = None
        self._publishing = threading.Lock()
        if page is not None:
            SharedPage.create(page, nbytes=_PAGE_BYTES)
            self._page = SharedPage(page)
            self._look()
            self._publish()
            self._begin_to_look()

    def before(self, order: StepOrder) -> None:
        """A step is about to run of which something may be to be done."""
        self.step = self._order = order
        self.is_due = True
        if order.give_back:
            self.memory.give_back()
        if order.measure:
            self.memory.start()

    def after(self, *, completed: bool = True) -> None:
        """A step has run, or failed on the way."""
        order, self._order = self._order, None
        if order is not None and order.measure and completed:
            peak = self.memory.peak_bytes()
            if peak >= 0:
                self.peaks.append(Measured(order.number, peak))
        self.step = None
        self.is_due = False
        if order is not None:
            with self._publishing:
                self._publish()
        if not self._looks:
            self._begin_to_look()
        if self._ended.locked():
            self._ended.release()

    def _begin_to_look(self) -> None:
        self._looks = True
        meter = weakref.ref(self)
        threading.Thread(
            target=_keep_looking, args=(meter,), name="prefill-gate", daemon=True
        ).start()

    def look(self) -> None:
        """See what others have taken and freed, and have a scheduler in another process see it."""
        page = self._page
        if page is not None:
            self._wait_for_the_end_of_a_step()
        self.memory.look()
        self._look()
        if page is not None:
            self._publish_between_steps(page)

    def _publish_between_steps(self, page: SharedPage) -> None:
        for _ in range(TRIES_TO_PUBLISH):
            if self._publish_if_between(page):
                break
            self._wait_for_the_end_of_a_step()

    def _wait_for_the_end_of_a_step(self) -> None:
        """Or for so long that it cannot be waited for."""
        self._ended.acquire(blocking=False)
        if self._is_in_step():
            self.is_due = True
            self._ended.acquire(timeout=LOOK_S)

    def _is_in_step(self) -> bool:
        return self.step is not None

    def _look(self) -> None:
        self.looked = _Look.now(self.memory.figures())
        if self._page is not None:
            self.looked.show(self._page.gauges)

    def _publish_if_between(self, page: SharedPage) -> bool:
        """Whether no step was seen to run, neither before all was read nor behind it."""
        with self._publishing:
            if self._is_in_step():
                return False
            self.is_due = True  # a step that runs meanwhile would end it
            now = self._encoded()
            is_between = self.is_due and not self._is_in_step()
            if is_between:
                page.write(now)
            return is_between

    def _publish(self) -> None:
        if self._page is not None:
            self._page.write(self._encoded())

    def _encoded(self) -> bytes:
        return _Page(self.memory.figures(), list(self.peaks)).encode()


def _keep_looking(meter: weakref.ref[RankMeter]) -> None:
    """As long as the meter is in use."""
    waiting = threading.Event()
    while not waiting.wait(LOOK_S):
        looking = meter()
        if looking is None:
            return
        try:
            looking.look()
        except Exception:  # memory may be what is missing; what is known grows old, and is told
            logger.exception("a look at the memory of this rank failed; the next is soon")
        del looking


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

    def room(self, configured_cap: int | None) -> int:
        """As of its meter's last look."""
        return self._meter.looked.room(configured_cap)

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
        readings = [page.figures.reading(configured_cap) for page in self._newest]
        if len(readings) == 1:
            return readings[0]
        return min(readings, key=lambda each: each.headroom_bytes)

    def device_bytes(self) -> int | None:
        """Of the rank whose GPU is smallest."""
        self._look()
        sizes = [page.figures.device_bytes for page in self._newest]
        return min((size for size in sizes if size is not None), default=None)

    def room(self, configured_cap: int | None) -> int:
        """By the gauges on their pages."""
        return min([_Look(*page.gauges[:4]).room(configured_cap) for page in self._pages])

    def measured(self) -> list[Measured]:
        """Those that have come to be on the page of every rank."""
        self._look()
        if not all(page.measured for page in self._newest):
            return []
        if self._newest[0].measured[-1].number <= self._told:
            return []
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
            self._newest = [_Page.decode(page.read()[1]) for page in self._pages]
            self._sequences = sequences


def rank_page(runtime_dir: Path, rank: int) -> Path:
    """Where the meter of a rank keeps its page."""
    return runtime_dir / "gate" / f"rank{rank}.page"


@functools.cache
def _numbers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")
