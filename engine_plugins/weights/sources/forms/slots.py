"""Memory for what is offered in another form than it is held: laid out once, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.memory.source_memory import copy_memory

__all__ = ["Slots", "part_of"]

ALIGNMENT_BYTES = 256
"""What slots begin at multiples of: kernels and network cards want no less."""


class Slots:
    """The slots of one layout: one allocation a device, registered like any other memory.

    They stay as long as the same is asked for, so that engines need not be told anew.

    Attributes:
        nbytes: bytes allocated, on all devices together.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[object, ...]] = []
        self._slots: list[list[SourceBox]] = []
        self.nbytes = 0

    def lay_out(
        self, boxes: Sequence[SourceBox], wanted: Sequence[Sequence[SourceBox]]
    ) -> list[list[SourceBox]]:
        """Give memory to what is offered for each box; the same as before for the same layout.

        Args:
            boxes: of the trainer's own memory.
            wanted: for each of them, what is offered in its place, on the meta device.

        Returns:
            `wanted` with memory behind it, on the device of its box.
        """
        layout: list[tuple[object, ...]] = [
            (box.data.device, part.name, part.global_shape, part.start, part.shape, part.data.dtype)
            for box, parts in zip(boxes, wanted, strict=True)
            for part in parts
        ]
        if layout != self._layout:
            self.release()  # before the new ones are there
            self._slots = self._made(boxes, wanted)
            self._layout = layout
        slots = iter(self._slots)
        return [next(slots) if parts else [] for parts in wanted]

    def release(self) -> None:
        """Let go of the memory; it is laid out anew when it is next asked for."""
        self._layout, self._slots, self.nbytes = [], [], 0

    def _made(
        self, boxes: Sequence[SourceBox], wanted: Sequence[Sequence[SourceBox]]
    ) -> list[list[SourceBox]]:
        taken = [(box.data.device, parts) for box, parts in zip(boxes, wanted, strict=True)]
        memory = _Memory((device, part) for device, parts in taken for part in parts)
        slots = [[memory.next(device, part) for part in parts] for device, parts in taken if parts]
        self.nbytes = memory.nbytes
        return slots


def part_of(
    box: SourceBox,
    dtype: torch.dtype,
    *,
    name: str | None = None,
    whole: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
) -> SourceBox:
    """What is offered in place of a box, without memory yet.

    Args:
        box: in whose place; what is not given is as it is there.
        dtype: of the offer.
        name: of the offered tensor.
        whole: its shape, in elements.
        start: first index of the offered box, in elements.
        shape: of the offered box, in elements.
    """
    return SourceBox(
        name=box.name if name is None else name,
        global_shape=box.global_shape if whole is None else tuple(whole),
        start=box.start if start is None else tuple(start),
        data=torch.empty(box.shape if shape is None else shape, dtype=dtype, device="meta"),
    )


class _Memory:
    """One allocation a device, from which slots are taken in order."""

    def __init__(self, wanted: Iterable[tuple[torch.device, SourceBox]]) -> None:
        sizes: dict[torch.device, int] = {}
        for device, part in wanted:
            sizes[device] = sizes.get(device, 0) + _aligned(part.data.nbytes)
        self.nbytes = sum(sizes.values())
        self._memory = {
            device: copy_memory(torch.empty(1, dtype=torch.uint8, device=device).expand(size))
            for device, size in sizes.items()
        }
        self._used = dict.fromkeys(sizes, 0)

    def next(self, device: torch.device, part: SourceBox) -> SourceBox:
        """The box with memory behind it."""
        start, nbytes = self._used[device], part.data.nbytes
        self._used[device] += _aligned(nbytes)
        memory = self._memory[device][start : start + nbytes]
        return SourceBox(
            name=part.name,
            global_shape=part.global_shape,
            start=part.start,
            data=memory.view(part.data.dtype).view(part.shape),
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
