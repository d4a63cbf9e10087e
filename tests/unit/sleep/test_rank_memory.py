"""On the CPU platform a rank's figure is the resident memory of its own process."""

from __future__ import annotations

import mmap
import os
import tempfile

import msgspec
import psutil
import pytest

from engine_plugins.sleep.memory_report import RankMemoryRow
from engine_plugins.sleep.process_identity import identify
from engine_plugins.sleep.process_memory import process_memory
from engine_plugins.sleep.rank_memory import RankMemory

MIB = 1 << 20
BLOCK = 64 * MIB
OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def touched(flags: int, file: int = -1, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """Pages of this process, each one resident."""
    return mmap.mmap(file, BLOCK, flags=flags | mmap.MAP_POPULATE, prot=prot)


def held(memory: RankMemory) -> int:
    sample = memory.sample()
    assert (sample.source, sample.quality, sample.reason) == ("process", "exact", "")
    assert sample.resident_bytes is not None
    return sample.resident_bytes


def test_pages_that_are_written_count_and_go_when_they_are_given_back() -> None:
    memory = RankMemory(3, None)
    before = held(memory)
    pages = touched(OWN)
    assert held(memory) - before == pytest.approx(BLOCK, abs=8 * MIB)
    pages.madvise(mmap.MADV_DONTNEED)
    assert held(memory) - before == pytest.approx(0, abs=8 * MIB)
    pages.close()


def test_shared_pages_count_and_pages_of_files_do_not() -> None:
    """A mapped checkpoint is the page cache's: it goes when memory is wanted."""
    memory = RankMemory(0, None)
    before = held(memory)
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), BLOCK)
        pages = touched(mmap.MAP_PRIVATE, file.fileno(), mmap.PROT_READ)
        assert held(memory) - before == pytest.approx(0, abs=8 * MIB)
        pages.close()
    shared = touched(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    assert held(memory) - before == pytest.approx(BLOCK, abs=8 * MIB)
    shared.close()


def test_it_is_what_others_see_of_the_process_but_files() -> None:
    seen = psutil.Process().memory_info()
    figure = process_memory(os.getpid()).resident_bytes
    assert figure is not None
    assert 0 < figure <= seen.rss + 16 * MIB


def test_a_process_that_is_gone_is_unknown() -> None:
    gone = msgspec.structs.replace(identify(), pid=2**22)
    sample = RankMemory(0, None, worker=gone).sample()
    assert (sample.resident_bytes, sample.quality, sample.reason) == (
        None,
        "unknown",
        "process_gone",
    )


def test_a_row_tells_the_baseline_and_what_settling_found() -> None:
    memory = RankMemory(1, None)
    assert memory.row(memory.sample()).baseline is None
    baseline = memory.take_baseline()
    assert baseline is not None
    pages = touched(OWN)
    now = memory.settled()
    told = memory.row(now, kept_bytes=7, components={"python": 5})
    assert told.sample.resident_bytes is not None
    assert told.baseline == baseline
    assert told.sample.resident_bytes - baseline.resident_bytes == pytest.approx(BLOCK, abs=8 * MIB)
    assert (told.tp_rank, told.process, told.device) == (1, identify(), None)
    assert (told.settled, told.settle_s, told.kept_bytes) == (True, now.seconds, 7)
    assert told.components == {"python": 5}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=RankMemoryRow) == told
    pages.close()
