"""Whether what stays resident through sleep grows from cycle to cycle.

The slope is Theil and Sen's: the median of the slopes between all pairs of cycles. A least-squares
line follows the one cycle in which a neighbour's buffer was counted; a median ignores up to 29 % of
such cycles. One lasting step (kernels loaded late, a pool that found its size) is not a leak either
and lies in one half of the window at most, so both halves must grow.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import msgspec

from engine_plugins.sleep.memory_report import ResidualReport

__all__ = ["AsleepCycle", "LeakTrend", "LeakWatch"]

WINDOW_CYCLES = 16
LEAK_BYTES_PER_CYCLE = 40 << 20
"""With noise of 64 MiB the slope of a half, 8 cycles, errs by 10 MiB: this lies well above what
noise does, and below a leak of 64 MiB."""


class AsleepCycle(msgspec.Struct, frozen=True, kw_only=True):
    """What a device held in one sleep; cycles without an exact figure are left out."""

    cycle: int
    resident_bytes: int


class LeakTrend(msgspec.Struct, frozen=True, kw_only=True):
    """The growth of one device over the last cycles."""

    device: str
    cycles: int
    slope_bytes: float
    """Bytes per cycle; 0 until there are two cycles."""
    leaking: bool
    """Whether both halves of a full window grow by more than noise does."""


class LeakWatch(msgspec.Struct, frozen=True, kw_only=True):
    """The last cycles of each device. Plain data: `after` gives the watch to keep."""

    cycle: int = 0
    asleep: dict[str, list[AsleepCycle]] = {}

    def after(self, report: ResidualReport) -> LeakWatch:
        """The watch with one more cycle, of a report that was made asleep."""
        cycle = self.cycle + 1
        asleep = dict(self.asleep)
        for device in report.devices:
            if device.quality == "exact" and device.resident_bytes is not None:
                held = device.resident_bytes - device.kept_bytes
                latest = AsleepCycle(cycle=cycle, resident_bytes=held)
                asleep[device.device] = [*asleep.get(device.device, ()), latest][-WINDOW_CYCLES:]
        return LeakWatch(cycle=cycle, asleep=asleep)

    def trends(self) -> list[LeakTrend]:
        """The growth of each device."""
        return [_trend(device, cycles) for device, cycles in self.asleep.items()]


def _trend(device: str, cycles: Sequence[AsleepCycle]) -> LeakTrend:
    middle = len(cycles) // 2
    halves = (_slope(cycles[:middle]), _slope(cycles[middle:]))
    return LeakTrend(
        device=device,
        cycles=len(cycles),
        slope_bytes=_slope(cycles),
        leaking=len(cycles) == WINDOW_CYCLES and min(halves) >= LEAK_BYTES_PER_CYCLE,
    )


def _slope(cycles: Sequence[AsleepCycle]) -> float:
    slopes = [
        (later.resident_bytes - earlier.resident_bytes) / (later.cycle - earlier.cycle)
        for earlier, later in itertools.combinations(cycles, 2)
    ]
    return statistics.median(slopes) if slopes else 0.0
