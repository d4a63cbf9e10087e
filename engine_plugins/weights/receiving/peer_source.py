"""One engine rank as a source for other engines: its live parameters, where they lie.

The destination map says which box of which HF tensor every parameter holds; read the other way
round it is a source map. Only parameters that were seen to hold just that are offered.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from engine_plugins.errors import ConflictError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.loader.destination import DestinationBox
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.base import Transport

__all__ = ["LiveLayout", "PeerSource", "peer_boxes"]

_SHOWN = 4


class LiveLayout(Protocol):
    """What is known of a rank's live parameters, as `Landing` knows it."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """By module, why its parameters are not known to hold what the loader copies."""
        ...

    def places(self) -> Sequence[tuple[DestinationBox, torch.Tensor]]:
        """Boxes of HF tensors, and the views of live memory that hold them."""
        ...


class PeerSource:
    """Keeps live parameters registered for peers, under an agent of its own.

    Of its own, because the agent that updates this rank registers the same memory for itself while
    it lands there, and not otherwise.

    Args:
        boxes: gives what the live parameters hold, the same list while they have not moved.
        transport: the agent; closed with this.
        tp_rank: this rank, as errors of peers will name it.
        model: facts of the engine's HF config.

    Raises:
        ConflictError: what `boxes` raises where they cannot be offered.
        TransportError: the memory could not be registered.
    """

    def __init__(
        self,
        boxes: Callable[[], Sequence[SourceBox]],
        transport: Transport,
        *,
        tp_rank: int,
        model: Mapping[str, str | int | bool],
    ) -> None:
        self._transport = transport
        self._boxes = boxes
        name = f"engine rank {tp_rank} ({socket.gethostname()}, pid {os.getpid()})"
        try:
            self._offered = boxes()
            self._source = WeightSource(
                lambda: self._offered, transport, source=name, global_rank=tp_rank, model=model
            )
        except BaseException:
            transport.close()
            raise
        self._manifest = self._source.manifest_bytes

    def manifest_bytes(self, word: int) -> bytes:
        """The manifest as msgpack; the same as before while nothing has moved.

        Parameters whose last axis is not the HF tensor's are offered as copies, which are brought
        up to date here; the work queued on the GPU is waited for.

        Args:
            word: the version word of what is offered, until `revoke`.

        Raises:
            ConflictError: as for the class.
            TransportError: as for the class.
        """
        boxes = self._boxes()
        if boxes is not self._offered or self._source.copied_bytes:
            self._offered = boxes
            self._source.refresh()
            self._manifest = self._source.manifest_bytes
        for device in {box.data.device for box in boxes if box.data.is_cuda}:
            torch.cuda.synchronize(device)
        self._source.offer(word)
        return self._manifest

    def revoke(self) -> None:
        """Let no peer take what it reads for whole: the parameters will be written to."""
        self._source.revoke()

    def close(self) -> None:
        """Take the registrations back and end the agent. Repeating it does nothing."""
        self._source.close()
        self._transport.close()


def peer_boxes(layout: LiveLayout, tensors: Sequence[LogicalTensor]) -> list[SourceBox]:
    """Every box of the HF tensors that this rank's live parameters hold, once.

    Args:
        layout: of the live parameters.
        tensors: the HF tensors that the engine's loader was traced with.

    Raises:
        ConflictError: modules that do not hold the tensors as they are in a checkpoint, by name.
    """
    if layout.reasons:
        named = [f"{module}: {why}" for module, why in layout.reasons.items()]
        more = f" (and {len(named) - _SHOWN} more modules)" if len(named) > _SHOWN else ""
        raise ConflictError(
            "this engine's live parameters do not give its weights back: "
            + "; ".join(named[:_SHOWN])
            + more,
            remedy="feed other engines from the trainer, or from an engine that serves these "
            "weights as its loader copies them",
        )
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    boxes: dict[tuple[str, tuple[int, ...], tuple[int, ...]], SourceBox] = {}
    for box, view in layout.places():
        boxes.setdefault(
            (box.tensor, box.start, box.shape),
            SourceBox(name=box.tensor, global_shape=shapes[box.tensor], start=box.start, data=view),
        )
    return list(boxes.values())
