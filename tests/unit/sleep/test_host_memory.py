"""Pages of tensors go back to the kernel and come back, checked by what the kernel says."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import psutil
import pytest
import torch

from engine_plugins.errors import SleepRefusedError
from engine_plugins.sleep.host_memory import HostMemory
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.resident_pages import Extent, drop_pages, private_pages

MIB = 1 << 20
BIG = 24 * MIB


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def filled(nbytes: int, value: int) -> torch.Tensor:
    """A tensor whose every page is resident, [nbytes] uint8."""
    return torch.full((nbytes,), value, dtype=torch.uint8)


def released(
    tensors: dict[MemoryTag, list[torch.Tensor]], *, keep: bool, folder: Path
) -> MemoryLedger:
    """A ledger over host memory whose tags are all released."""
    sources = {tag: (lambda each=each: each) for tag, each in tensors.items()}
    ledger = MemoryLedger(HostMemory(sources, folder=folder))
    ledger.release(ledger.tags, keep=keep)
    return ledger


def test_cache_leaves_memory_and_comes_back_zeroed(tmp_path: Path) -> None:
    """All but the edges of the storage is gone while released; afterwards every byte is zero."""
    cache = filled(BIG + 100, 7)
    before = resident()
    ledger = released({"kv_cache": [cache]}, keep=True, folder=tmp_path)
    assert before - resident() > BIG - MIB
    assert list(tmp_path.iterdir()) == []
    ledger.restore(["kv_cache"])
    assert not cache.any()


def test_kept_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Aliases and views count once; values return whatever shares the pages."""
    weights = torch.randn(BIG // 4)
    tied = weights.view(-1, 8)
    small = torch.randn(10)
    expected, expected_small = weights.clone(), small.clone()
    before = resident()
    ledger = released({"weights": [weights, tied, small]}, keep=True, folder=tmp_path)
    assert before - resident() > BIG - MIB
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    ledger.restore(["weights"])
    assert torch.equal(weights, expected)
    assert torch.equal(small, expected_small)


def test_discarded_weights_come_back_as_nothing(tmp_path: Path) -> None:
    """Without `keep` nothing is written anywhere."""
    weights = filled(BIG, 9)
    ledger = released({"weights": [weights]}, keep=False, folder=tmp_path / "is never used")
    ledger.restore(["weights"])
    assert not weights[mmap.PAGESIZE : -mmap.PAGESIZE].any()


def test_what_stays_is_counted(tmp_path: Path) -> None:
    """Less than a page can never go."""
    small = torch.ones(100, dtype=torch.uint8)
    ledger = released({"weights": [small]}, keep=True, folder=tmp_path)
    assert sum(ledger.unreleased().values()) == 100
    assert small.all()


def test_mapped_files_are_left_alone(tmp_path: Path) -> None:
    """Dropping their pages would bring the file's bytes back over changed weights."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(BIG))
    mapped = torch.from_file(str(path), shared=False, size=BIG, dtype=torch.uint8)
    mapped.fill_(3)
    ledger = released({"weights": [mapped]}, keep=False, folder=tmp_path)
    assert sum(ledger.unreleased().values()) == BIG
    assert (mapped == 3).all()


def test_a_full_disk_releases_nothing(tmp_path: Path) -> None:
    """The weights are still there, and another sleep may be tried."""
    weights = filled(MIB, 5)
    backend = HostMemory({"weights": lambda: [weights]}, folder=tmp_path / "missing")
    ledger = MemoryLedger(backend)
    with pytest.raises(SleepRefusedError, match="missing"):
        ledger.release(["weights"], keep=True)
    assert (weights == 5).all()
    assert ledger.released == ()


def test_locked_pages_are_an_error_that_names_them() -> None:
    """The kernel keeps them, so nobody may believe that they are gone."""
    area = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(area)
    extent = Extent(ctypes.addressof(anchor), len(area))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(extent.address), ctypes.c_size_t(extent.nbytes)):
        pytest.skip(f"mlock is not allowed here: {os.strerror(ctypes.get_errno())}")
    with pytest.raises(OSError, match=f"{extent.address:#x}"):
        drop_pages([extent])
    libc.munlock(ctypes.c_void_p(extent.address), ctypes.c_size_t(extent.nbytes))
    assert private_pages([extent]) == [extent]
    del anchor
    area.close()
