"""Where each checkpoint tensor lies in a transformers model's own, by transformers' own tables.

transformers >= 5 renames, splits and fuses tensors while it loads, and undoes that in
`save_pretrained`. The undoing is run here once, on placeholders without memory: what comes out
says by its storage, offset and strides of which element it is a view. No family is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine_plugins.weights.sources.tensor_views import View, view_of

__all__ = ["Piece", "Undo", "traced_pieces"]

Undo = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Tensors by the model's names -> views of them, or of several joined, by the checkpoint's."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A region of a checkpoint tensor that lies within one of the model's tensors.

    Attributes:
        name: of the checkpoint tensor.
        shape: of the whole checkpoint tensor.
        start: first index of the region on each of its axes.
        view: where its elements are in the model's tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    view: View


def traced_pieces(
    shapes: Mapping[str, tuple[int, ...]], undo: Undo
) -> tuple[dict[str, list[Piece]], list[str]]:
    """Find what a conversion makes of each of the model's tensors.

    Args:
        shapes: of the model's whole tensors, by its names.
        undo: the conversion.

    Returns:
        The pieces of each of the model's tensors; and the checkpoint tensors that are no views of
        the model's, because the conversion puts their elements in another order.
    """
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {tensor.untyped_storage()._cdata: name for name, tensor in given.items()}
    with _Placeholders() as joined:
        made = undo(given)
    pieces: dict[str, list[Piece]] = {}
    others: list[str] = []
    for name, tensor in made.items():
        parts = joined.parts_of(tensor)
        if any(part.untyped_storage()._cdata not in names for _, part in parts):
            others.append(name)
            continue
        for start, part in parts:
            holder = names[part.untyped_storage()._cdata]
            pieces.setdefault(holder, []).append(
                Piece(
                    name=name,
                    shape=tuple(tensor.shape),
                    start=start,
                    view=view_of(part, shapes[holder]),
                )
            )
    return pieces, others


_Part = tuple[tuple[int, ...], torch.Tensor]
"""First index in the joined tensor, and what lies there."""


class _Placeholders(TorchFunctionMode):
    """Keeps views views, and remembers what was joined, where real tensors would be copied."""

    def __init__(self) -> None:
        super().__init__()
        self._joined: dict[int, tuple[torch.Tensor, list[_Part]]] = {}

    def parts_of(self, tensor: torch.Tensor) -> list[_Part]:
        """What a tensor was joined from; one part if it was not."""
        found = self._joined.get(tensor.untyped_storage()._cdata)
        if found is None:
            return [((0,) * tensor.ndim, tensor)]
        whole, parts = found
        same = (tensor.shape, tensor.stride()) == (whole.shape, whole.stride())
        return parts if same else [((0,) * tensor.ndim, tensor)]  # a view of it: no memory of ours

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        if func in (torch.cat, torch.concat, torch.concatenate):
            return self._join(*args, **options)
        if func is torch.stack:
            tensors, dim = args[0], options.get("dim", args[1] if len(args) > 1 else 0)
            return self._join([tensor.unsqueeze(dim) for tensor in tensors], dim)
        return func(*args, **options)

    def _join(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        whole = torch.cat(list(tensors), dim)
        parts: list[_Part] = []
        before = 0
        for tensor in tensors:
            for start, part in self.parts_of(tensor):
                moved = list(start)
                moved[dim] += before
                parts.append((tuple(moved), part))
            before += tensor.shape[dim]
        self._joined[whole.untyped_storage()._cdata] = (whole, parts)
        return whole
