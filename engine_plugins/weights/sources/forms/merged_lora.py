"""LoRA merged for the engines alone: weights that adapters change are computed into slots.

The trainer's base weights stay as they are. What adapters leave alone is read in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.hardware.queued_work import finish_queued_work
from engine_plugins.weights.sources.dtensor_source import is_dtensor, shard_boxes
from engine_plugins.weights.sources.forms.peft_model import (
    Adapted,
    Delta,
    adapted_weights,
    base_tensors,
)
from engine_plugins.weights.sources.forms.slots import Slots, part_of

__all__ = ["MergedLora"]


class MergedLora:
    """The tensors of a peft model as its base model would have them with its adapters merged.

    For every update: `gathers`, each of what it gives on all ranks at once, then `tensors`. Before
    the first, `tensors` gives slots that hold nothing yet: what to register.

    Args:
        model: the peft model; sharded by FSDP2 or not.
        merge: False refuses adapters that are not merged.
    """

    def __init__(self, model: nn.Module, *, merge: bool) -> None:
        self._model, self._merge = model, merge
        self._slots = Slots()

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self._slots.nbytes

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base model's tensors under its own names, those that adapters change merged.

        Raises:
            SourceError: there are adapters to merge, and they are not to be merged.
            UnsupportedError: see `adapted_weights`.
        """
        merged = {each.name: slot for each, _, slot in self._laid_out()}
        for name, tensor in base_tensors(self._model):
            yield name, _like(tensor, merged[name]) if name in merged else tensor

    def gathers(self, members: Collection[int]) -> Sequence[Callable[[], None]]:
        """What merges, once every rank has looked: shards of adapters are gathered meanwhile.

        Raises:
            SourceError, UnsupportedError: as for `tensors`.
        """
        self._adapted()
        return [self._fill]

    def release(self) -> None:
        """Let go of the slots; the next update computes them anew."""
        self._slots.release()

    def _adapted(self) -> list[Adapted]:
        found = adapted_weights(self._model)
        if found and not self._merge:
            raise SourceError(
                f"{len(found)} weights have adapters (peft) that are not merged, {found[0].name} "
                "the first: engines would serve the model without them",
                remedy="make the sender with merge_lora=True, which merges into memory of its own "
                "for every update; or call model.merge_adapter() before each",
            )
        return found

    def _laid_out(self) -> list[tuple[Adapted, torch.Tensor, torch.Tensor]]:
        """Each weight that adapters change, its memory on this rank, and its slot."""
        adapted = self._adapted()
        boxes = [_whole(each.name, _local(each.weight)) for each in adapted]
        slots = self._slots.lay_out(boxes, [[part_of(box, box.data.dtype)] for box in boxes])
        return [
            (each, box.data, slot.data)
            for each, box, (slot,) in zip(adapted, boxes, slots, strict=True)
        ]

    @torch.no_grad()
    def _fill(self) -> None:
        laid_out = self._laid_out()
        finish_queued_work(base for _, base, _ in laid_out)
        for each, base, slot in laid_out:
            deltas = [_whole_delta(delta) for delta in each.deltas]
            weight = each.weight
            if is_dtensor(weight):
                mine = shard_boxes(each.name, weight, base)
                theirs = shard_boxes(each.name, weight, slot)
            else:
                mine, theirs = [_whole(each.name, base)], [_whole(each.name, slot)]
            for box, target in zip(mine, theirs, strict=True):
                target.data.copy_(_merged(box, deltas))


def _merged(box: SourceBox, deltas: Sequence[Delta]) -> torch.Tensor:
    """A box of a weight with what the adapters add there; float32, rounded once by who copies."""
    total = torch.zeros((), dtype=torch.float32, device=box.data.device)
    for delta in deltas:
        rows, columns = reversed(box.slices) if delta.transposed else box.slices
        added = delta.left[rows] @ delta.right[:, columns]
        total = total + (added.t() if delta.transposed else added) * delta.scale
    return total + box.data


def _whole_delta(delta: Delta) -> Delta:
    """The same, of which this rank has all, in float32."""
    left, right = _gathered(delta.left).float(), _gathered(delta.right).float()
    return replace(delta, left=left, right=right)


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of an adapter's factor, on the device of this rank's share of it."""
    if not is_dtensor(tensor):
        return tensor.detach()
    place, wire = tensor.to_local().device, tensor.device_mesh.device_type
    moved: Any = tensor if place.type == wire else tensor.to(wire)  # of one offloaded to the host
    whole: torch.Tensor = moved.full_tensor()
    return whole.to(place)


def _like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Other memory for a tensor; of a DTensor, for this rank's share."""
    if not is_dtensor(tensor):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor.detach()


def _whole(name: str, data: torch.Tensor) -> SourceBox:
    shape = tuple(data.shape)
    return SourceBox(name=name, global_shape=shape, start=(0,) * len(shape), data=data)
