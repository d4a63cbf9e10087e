"""Sleep on engines without a GPU: the pages of their tensors go back to the kernel.

What has to come back waits in a file that has no name, so it ends with this process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine_plugins.errors import SleepRefusedError
from engine_plugins.sleep.memory_backend import MemoryTag
from engine_plugins.sleep.resident_pages import Extent, drop_pages, private_pages, view
from engine_plugins.sleep.storages import storages

__all__ = ["HostMemory"]

Tensors = Callable[[], Iterable[torch.Tensor]]
_CHUNK = 64 << 20


@dataclass(kw_only=True)
class _Released:
    pages: Sequence[Extent]
    file: int | None
    """Open on the contents of the pages, one after the other."""
    left: dict[str, int] = field(default_factory=dict)


class HostMemory:
    """The `MemoryBackend` of tensors in ordinary host memory.

    A tensor's storage is given back but for what shares its first and last page with others. Cache
    comes back zeroed in full. Weights come back as they were, or as nothing of use.

    Args:
        tensors: by tag, what to release; asked at each release.
        kept: by tag, bytes that no tensor shows and that stay, by the reason why.
        folder: where contents wait; by default the system's folder for temporary files, which must
            not be in memory itself.
    """

    def __init__(
        self,
        tensors: Mapping[MemoryTag, Tensors],
        *,
        kept: Mapping[MemoryTag, Callable[[], Mapping[str, int]]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._tensors = tensors
        self._kept = kept or {}
        self._folder = folder
        self._released: dict[MemoryTag, _Released] = {}

    together = False

    @property
    def tags(self) -> frozenset[MemoryTag]:
        """What can be released here."""
        return frozenset(self._tensors)

    def release(self, tag: MemoryTag, *, keep: bool) -> None:
        """Give the pages back; `keep` writes them to a file first.

        Raises:
            SleepRefusedError: the file cannot be written; nothing is released.
            OSError: the kernel keeps pages.
        """
        extents = _on_host(self._tensors[tag]())
        pages = private_pages(extents)
        file = self._written(pages) if keep else None
        stay = sum(extent.nbytes for extent in extents) - sum(extent.nbytes for extent in pages)
        left = {**self._kept.get(tag, dict)()}
        if stay:
            left["shares its pages, or is mapped from elsewhere"] = stay
        self._released[tag] = _Released(pages=pages, file=file, left=left)
        if tag == "kv_cache":
            for extent in extents:
                _zero_edges(extent, pages)
        drop_pages(pages)

    def restore(self, tag: MemoryTag) -> None:
        """Fill the pages from their file; without one they are zero, and mapped when touched."""
        released = self._released.pop(tag)
        if released.file is None:
            return
        try:
            for extent in released.pages:
                _read(released.file, view(extent))
        finally:
            os.close(released.file)

    def unreleased(self, tag: MemoryTag) -> dict[str, int]:
        """Bytes of a released tag that stayed resident, by the reason why."""
        released = self._released.get(tag)
        return {} if released is None else released.left

    def _written(self, pages: Sequence[Extent]) -> int:
        try:
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                for extent in pages:
                    _write(file.fileno(), view(extent))
                os.lseek(file.fileno(), 0, os.SEEK_SET)
                return os.dup(file.fileno())
        except OSError as error:
            nbytes = sum(extent.nbytes for extent in pages)
            raise SleepRefusedError(
                f"{nbytes} bytes of weights cannot wait in {self._folder or tempfile.gettempdir()}"
                f": {error}",
                remedy="make room there, choose another folder with ENGINE_PLUGINS_SLEEP_DIR, or "
                "sleep with level 2",
            ) from error


def _on_host(tensors: Iterable[torch.Tensor]) -> list[Extent]:
    """The memory of those tensors that lie here, in order of address."""
    here = (tensor for tensor in tensors if tensor.device.type == "cpu")
    return sorted(Extent(each.data_ptr(), each.nbytes()) for each in storages(here))


def _zero_edges(extent: Extent, pages: Sequence[Extent]) -> None:
    """Clear what of a storage is not among the pages that are about to be dropped."""
    at = extent.address
    for page in pages:
        if page.end <= extent.address or page.address >= extent.end:
            continue
        if at < page.address:
            _zero(Extent(at, page.address - at))
        at = page.end
    if at < extent.end:
        _zero(Extent(at, extent.end - at))


def _zero(extent: Extent) -> None:
    view(extent)[:] = bytes(extent.nbytes)


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data[:_CHUNK]) :]


def _read(file: int, data: memoryview) -> None:
    while data:
        count = os.readv(file, [data[:_CHUNK]])
        if not count:
            raise OSError("the file that holds a sleeping model's weights ends too early")
        data = data[count:]
