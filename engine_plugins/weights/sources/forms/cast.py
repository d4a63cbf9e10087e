"""The same values in another dtype: the one that the engines' parameters have, or one told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from engine_plugins.errors import SettingsError, SourceError
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.sources.forms.form_source import Filled
from engine_plugins.weights.sources.forms.shared_blocks import SharedBlocks
from engine_plugins.weights.sources.forms.slots import part_of

__all__ = ["Cast", "SendDtype", "SentDtypes", "sent_dtypes"]

SendDtype = Literal["engine", "as_is"] | torch.dtype | None

_ROUTING_BIAS = "e_score_correction_bias"
"""Told apart by its few lowest bits: a dtype told for all tensors is not meant for it."""


class SentDtypes:
    """The dtype in which each tensor is sent.

    Args:
        everywhere: of all floating tensors but routers' correction biases; None leaves each as it
            is held. What is learned of an engine goes before it.
        learns: whether engines are asked.

    Attributes:
        changes: how often it was taught.
    """

    def __init__(self, everywhere: torch.dtype | None, *, learns: bool) -> None:
        self.learns = learns
        self.changes = 0
        self._everywhere = everywhere
        self._learned: dict[str, torch.dtype] = {}

    def of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """In which dtype a tensor of this name goes that is held in `dtype`.

        Whole numbers, and floats of one byte, always go as they are.
        """
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return dtype
        everywhere = None if name.endswith(_ROUTING_BIAS) else self._everywhere
        return self._learned.get(name) or everywhere or dtype

    def learn(self, wanted: Mapping[str, torch.dtype]) -> None:
        """Send these tensors in these dtypes from now on."""
        self._learned.update(wanted)
        self.changes += 1


def sent_dtypes(asked: object, others: torch.dtype | None = None) -> SentDtypes:
    """What an option `send_dtype` means.

    Args:
        asked: the option.
        others: a dtype told beside it, for all that is not quantized.

    Raises:
        SettingsError: it is none that weights can be sent in.
    """
    if asked == "engine":
        return SentDtypes(others, learns=True)
    if asked is None or asked == "as_is":
        return SentDtypes(others, learns=False)
    if isinstance(asked, torch.dtype) and asked.is_floating_point and asked.itemsize > 1:
        return SentDtypes(asked, learns=False)
    raise SettingsError(
        f"send_dtype is {asked!r}, which is none that weights can be cast to",
        remedy="give 'engine' (as each engine's parameter has it), 'as_is', or a torch dtype as "
        "torch.bfloat16; for FP8 there is quantization='fp8'",
    )


class Cast:
    """The `Form` of tensors that are sent in another dtype than they are held in."""

    def __init__(self, dtypes: SentDtypes) -> None:
        self._dtypes = dtypes

    @property
    def changes(self) -> int:
        """How often other dtypes were learned."""
        return self._dtypes.changes

    def parts(self, box: SourceBox) -> Sequence[SourceBox]:
        """A copy of the box in its dtype, where that is another."""
        dtype = self._dtypes.of(box.name, box.data.dtype)
        return () if dtype == box.data.dtype else [part_of(box, dtype)]

    def measure(self, boxes: Sequence[SourceBox]) -> list[SharedBlocks]:
        """Nothing: each process casts what it holds."""
        return []

    def settle(self, told: Iterable[SharedBlocks], boxes: Sequence[SourceBox]) -> None:
        """Nothing is to be heard."""

    def fill(self, filled: Sequence[Filled]) -> None:
        """Cast in as few launches as their memory allows: a batch for each device and dtypes.

        Raises:
            SourceError: a finite value that became infinite, in a dtype of a much smaller range.
        """
        batches: dict[object, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for box, (slot,) in filled:
            if box.data.is_contiguous():
                key = (box.data.device, box.data.dtype, slot.data.dtype)
                targets, sources = batches.setdefault(key, ([], []))
                targets.append(slot.data)
                sources.append(box.data)
            else:  # one such in a batch would have the whole batch copied one by one
                slot.data.copy_(box.data)
        for targets, sources in batches.values():
            torch._foreach_copy_(targets, sources)
        _refuse_overflow(filled)


def _refuse_overflow(filled: Sequence[Filled]) -> None:
    """Look at what went into float16, say; bfloat16 has the range of float32, and costs nothing."""
    found: dict[torch.device, list[tuple[SourceBox, torch.Tensor]]] = {}
    for box, (slot,) in filled:
        held, sent = torch.finfo(box.data.dtype), torch.finfo(slot.data.dtype)
        if box.data.numel() and sent.max < held.max / 2:
            lost = (slot.data.isinf() & box.data.isfinite()).any()
            found.setdefault(box.data.device, []).append((slot, lost))
    for each in found.values():  # one wait for a device, not for each tensor
        wrong = torch.stack([lost for _, lost in each]).tolist()
        slots = [slot for (slot, _), is_wrong in zip(each, wrong, strict=True) if is_wrong]
        if slots:
            more = f" (nor those of {len(slots) - 1} more tensors)" if len(slots) > 1 else ""
            sent_in = str(slots[0].data.dtype).removeprefix("torch.")
            raise SourceError(
                f"{slots[0].name} has values that {sent_in} cannot hold{more}: they would be "
                "infinite in the engine",
                remedy="start the engine in bfloat16 or float32, whose range is larger",
            )
