"""Sleep through torch_memory_saver: physical memory goes back to the GPU, the addresses stay.

The library ends the process on a wrong state and where memory is short at resume; so it is called
through a `MemoryLedger`, and asked for nothing that would not fit.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch

from engine_plugins.errors import NotConfiguredError, SleepRefusedError
from engine_plugins.sleep.hook_mode import HookMode
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.storages import storages

__all__ = ["Saver", "SaverMemory", "load_memory_saver", "pool_bytes"]

logger = logging.getLogger(__name__)

Tensors = Callable[[], Iterable[torch.Tensor]]


class Saver(Protocol):
    """What is used of `torch_memory_saver.torch_memory_saver`."""

    def pause(self, tag: str) -> None:
        """Release the memory of every region of this tag."""
        ...

    def resume(self, tag: str) -> None:
        """Map it again, at the same addresses."""
        ...


def load_memory_saver(mode: HookMode) -> Saver:
    """The library's one object, told its hook mode; to be called before its first use.

    Raises:
        NotConfiguredError: it is not installed, or was used in some mode before.
    """
    try:
        saver = import_module("torch_memory_saver").torch_memory_saver
        saver.hook_mode = mode
    except ImportError as error:
        raise NotConfiguredError(
            f"memory cannot be released: torch_memory_saver cannot be imported ({error})",
            remedy='pip install "engine-plugins[memory-saver]"',
        ) from error
    except (AssertionError, AttributeError) as error:
        raise NotConfiguredError(
            f"torch_memory_saver is in use already, and its hook mode cannot be set to {mode}",
            remedy="set the mode before the first region, pause or resume of this process",
        ) from error
    found: Saver = saver
    return found


class SaverMemory:
    """The `MemoryBackend` of regions that torch_memory_saver made, one tag each.

    Args:
        saver: the library's object.
        tensors: by tag, what lies in its regions; asked at each release that keeps contents.
        sizes: bytes that a tag's regions take on the device, asked at each release.
        mode: the library's hook mode; in `torch` it has no CUDA graphs.
        lasting: by tag, tensors that come back from every release, such as buffers that no
            checkpoint holds.
        backed_up: tags whose regions were made with `enable_cpu_backup`: the library keeps their
            contents, and no copy is made here.
        free_bytes: bytes that are free on the device.
    """

    together = False

    def __init__(
        self,
        saver: Saver,
        tensors: Mapping[MemoryTag, Tensors],
        *,
        sizes: Callable[[MemoryTag], int],
        mode: HookMode,
        lasting: Mapping[MemoryTag, Tensors] | None = None,
        backed_up: Collection[MemoryTag] = (),
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._tensors = tensors
        self._sizes = sizes
        self._mode = mode
        self._lasting = lasting or {}
        self._backed_up = backed_up
        self._saver = saver
        self._free_bytes = free_bytes or _free_device_bytes
        self._needs: dict[MemoryTag, int] = {}
        self._copies: dict[MemoryTag, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def tags(self) -> frozenset[MemoryTag]:
        """What can be released here."""
        graphs = {"cuda_graph"} if self._mode == "torch" else set()
        return frozenset(tag for tag in self._tensors if tag not in graphs)

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        """Unmap the tag's regions; what has to come back waits in host memory.

        Raises:
            SleepRefusedError: the host lacks the memory for it; nothing is released.
        """
        needed = self._sizes(tag)
        copies = _copied(self._to_copy(tag, keep=keep))
        _synchronize()
        before = self._free_bytes()
        self._saver.pause(tag)
        self._needs[tag], self._copies[tag] = needed, copies
        if needed and self._free_bytes() <= before:
            logger.warning("releasing %s freed no memory of the device", tag)

    def restore(self, tag: MemoryTag) -> None:
        """Map the regions again and fill in what waited.

        Raises:
            SleepRefusedError: the device lacks the memory; nothing is mapped.
        """
        needed, free = self._needs[tag], self._free_bytes()
        if needed > free:
            raise SleepRefusedError(
                f"{tag} needs {needed} bytes of the GPU and {free} are free",
                remedy="have whoever uses the GPU now release its memory, then wake again",
            )
        self._saver.resume(tag)
        for live, copy in self._copies.pop(tag):
            live.copy_(copy)
        _synchronize()

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        """Nothing: a region goes as a whole."""
        return {}

    def _to_copy(self, tag: MemoryTag, *, keep: bool) -> Iterator[torch.Tensor]:
        if tag in self._lasting:
            yield from self._lasting[tag]()
        if keep and tag not in self._backed_up:
            yield from self._tensors[tag]()


def pool_bytes(
    tensors: Iterable[torch.Tensor], segments: Iterable[Mapping[str, Any]] | None = None
) -> int:
    """Bytes that the allocator's pools with these tensors in them take on the device.

    A region has a pool of its own, so this is what it gives back: cached blocks included.

    Args:
        tensors: what lies in the pools.
        segments: as `torch.cuda.memory_snapshot()` gives them, which is the default.
    """
    rows = list(torch.cuda.memory_snapshot() if segments is None else segments)
    addresses = sorted(each.data_ptr() for each in storages(tensors))
    pools = {row["segment_pool_id"] for row in rows if _holds(row, addresses)}
    return sum(row["total_size"] for row in rows if row["segment_pool_id"] in pools)


def _holds(segment: Mapping[str, Any], addresses: Sequence[int]) -> bool:
    """Whether one of the addresses, in order, lies in the segment."""
    start, end = segment["address"], segment["address"] + segment["total_size"]
    return bisect_left(addresses, start) < bisect_left(addresses, end)


def _copied(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each storage once, as bytes, with a copy in host memory."""
    live = [
        torch.empty(0, dtype=torch.uint8, device=each.device).set_(each)
        for each in storages(tensors)
    ]
    try:
        return [(each, torch.empty_like(each, device="cpu").copy_(each)) for each in live]
    except RuntimeError as error:
        nbytes = sum(each.nbytes for each in live)
        raise SleepRefusedError(
            f"{nbytes} bytes cannot wait in host memory: {error}",
            remedy="sleep with level 2, or give the engine more host memory",
        ) from error


def _free_device_bytes() -> int:
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def _synchronize() -> None:
    """Nothing that runs on the device may meet memory that goes, or is not filled yet."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
