"""The peak of a stretch of time, as the kernel saw it."""

from __future__ import annotations

import mmap

from engine_plugins.weights.hardware.peak_memory import PeakMemory

MIB = 1 << 20


def _touch(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes)
    for page in range(0, nbytes, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def test_memory_that_was_given_back_still_counts_for_the_peak() -> None:
    """64 MiB held for a moment are seen; an earlier, higher peak of the process is not."""
    _touch(256 * MIB).close()
    measuring = PeakMemory.start(already_held=0)
    _touch(64 * MIB).close()
    assert 60 * MIB < measuring.peak_extra_bytes() < 160 * MIB


def test_what_was_held_before_counts_as_extra() -> None:
    """A receive buffer that an earlier update left resident is this update's all the same."""
    without = PeakMemory.start(already_held=0).peak_extra_bytes()
    with_it = PeakMemory.start(already_held=10 * MIB).peak_extra_bytes()
    assert 5 * MIB < with_it - without < 15 * MIB
