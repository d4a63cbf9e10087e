"""Boxes described once, and again only when a tensor under them has moved.

To describe a large model takes most of a second in every update, and between two updates nearly
always nothing but values has changed. To see that takes a look at every tensor: at its storage,
its place in it, its shape, strides and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from engine_plugins.weights.boxes.placement import SourceBox

__all__ = ["KnownBoxes", "Remembered", "layout_of"]

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class KnownBoxes(list[SourceBox]):
    """Boxes of which it is known that nothing has moved, for as long as it is the same object."""


class Remembered:
    """Describes named tensors as boxes; the same object while none of them has moved.

    What a description says must follow from the names and from where the tensors lie alone.

    Args:
        look: gives the tensors as they are now.
        describe: makes boxes of them.
    """

    def __init__(
        self,
        look: Callable[[], NamedTensors],
        describe: Callable[[Sequence[tuple[str, torch.Tensor]]], Sequence[SourceBox]],
    ) -> None:
        self._look = look
        self._describe = describe
        self._names: list[str] = []
        self._layouts: list[tuple[object, ...]] = []
        self._boxes: KnownBoxes | None = None

    def __call__(self) -> KnownBoxes:
        """The boxes as they are now.

        Raises:
            EnginePluginError: what `look` and `describe` raise.
        """
        found = self._look()
        pairs = list(found.items()) if isinstance(found, Mapping) else list(found)
        boxes = self._boxes
        if boxes is not None and self._unmoved(pairs):
            return boxes
        self.forget()
        boxes = KnownBoxes(self._describe(pairs))
        self._names = [name for name, _ in pairs]
        self._layouts = [layout_of(tensor) for _, tensor in pairs]
        self._boxes = boxes
        return boxes

    def forget(self) -> None:
        """Hold on to no memory."""
        self._names, self._layouts, self._boxes = [], [], None

    def _unmoved(self, pairs: Sequence[tuple[str, torch.Tensor]]) -> bool:
        return [name for name, _ in pairs] == self._names and all(
            layout_of(tensor) == known
            for (_, tensor), known in zip(pairs, self._layouts, strict=True)
        )


def layout_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that a box and its place follow from; of a class that keeps it elsewhere, never equal.

    A storage counts as the same while it is the same object at the same address and of the same
    size: one that was emptied and filled again looks alike (`WeightSource.release` is for it).
    """
    if type(tensor) in _PLAIN:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse
            return (object(),)
        return (
            storage._cdata,
            storage.data_ptr(),
            storage.nbytes(),
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_neg() or tensor.is_conj(),
        )
    local, spec = getattr(tensor, "_local_tensor", None), getattr(tensor, "_spec", None)
    if spec is None or type(local) is not torch.Tensor:
        return (object(),)
    return (spec, tensor.shape, *layout_of(local))
