"""A trainer's boxes as they are offered: some as they lie, others as copies in slots.

What a copy is, its form says: the same values in another dtype, or quantized ones. Each form
claims the boxes that it is for, and fills their slots anew for every update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.hardware.queued_work import finish_queued_work
from engine_plugins.weights.sources.forms.shared_blocks import SharedBlocks
from engine_plugins.weights.sources.forms.slots import Slots
from engine_plugins.weights.sources.remembered import KnownBoxes

__all__ = ["Filled", "Form", "FormSource"]


class Filled(NamedTuple):
    """A box, and the slots that are offered in its place."""

    box: SourceBox
    slots: Sequence[SourceBox]


class Form(Protocol):
    """One way in which an offer differs from what is held."""

    @property
    def changes(self) -> int:
        """How often it has come to claim other boxes, or in another way."""
        ...

    def parts(self, box: SourceBox) -> Sequence[SourceBox]:
        """What is offered in place of a box, on the meta device; nothing where it is not for it.

        Raises:
            SourceError: a box that should have this form, and cannot.
        """
        ...

    def measure(self, boxes: Sequence[SourceBox]) -> list[SharedBlocks]:
        """What other processes must hear of these boxes before any fills its slots."""
        ...

    def settle(self, told: Iterable[SharedBlocks], boxes: Sequence[SourceBox]) -> None:
        """Hear what all processes said, this one too."""
        ...

    def fill(self, filled: Sequence[Filled]) -> None:
        """Bring slots up to date with their boxes."""
        ...


class FormSource:
    """What one process offers.

    For every update: `measure` on all processes, `settle` with what all of them said, then
    `boxes`. Before the first `settle`, `boxes` gives slots that hold nothing yet: what to
    register.

    Args:
        describe: this process's boxes as they are now.
        forms: the first that claims a box has it; a box that none claims is offered as it lies.
    """

    def __init__(self, describe: Callable[[], Sequence[SourceBox]], forms: Sequence[Form]) -> None:
        self._describe = describe
        self._forms = forms
        self._slots = Slots()
        self._taken: Sequence[SourceBox] | None = None
        self._due = False
        self._filled: list[list[Filled]] = []
        """By form, what is to be filled of the boxes that were offered last."""
        self._known: tuple[Sequence[SourceBox], list[int]] | None = None
        self._offered: Sequence[SourceBox] = ()

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots, on all devices together."""
        return self._slots.nbytes

    def measure(self) -> list[SharedBlocks]:
        """Look at the boxes, and say of them what other processes must hear.

        Raises:
            SourceError: a box that cannot be offered in its form.
        """
        self._taken = self._describe()
        finish_queued_work(box.data for box in self._taken)
        with torch.no_grad():
            return [said for form in self._forms for said in form.measure(self._taken)]

    def settle(self, told: Iterable[SharedBlocks]) -> None:
        """Learn what all processes said, this one too; the next `boxes` fills the slots."""
        told = list(told)
        for form in self._forms:
            form.settle(told, self._taken or ())
        self._due = True

    def boxes(self) -> Sequence[SourceBox]:
        """Offer what was measured last, slots filled.

        Raises:
            SourceError: a box that cannot be offered in its form.
        """
        taken, self._taken = self._describe() if self._taken is None else self._taken, None
        self._lay_out(taken)
        if self._due:
            self._due = False  # or a second look within an update would fill them again
            if any(self._filled):
                finish_queued_work(box.data for box in taken)
            with torch.no_grad():
                for form, each in zip(self._forms, self._filled, strict=True):
                    form.fill(each)
        return self._offered

    def release(self) -> None:
        """Let go of the slots, and of whatever was measured; the next `boxes` makes them anew."""
        self._taken, self._due, self._known = None, False, None
        self._filled, self._offered = [], ()
        self._slots.release()

    def _lay_out(self, taken: Sequence[SourceBox]) -> None:
        """Give the boxes their slots; for the same boxes there is nothing to do."""
        changes = [form.changes for form in self._forms]
        if self._known is not None and taken is self._known[0] and changes == self._known[1]:
            return
        claims = [self._claimed(box) for box in taken]
        laid_out = self._slots.lay_out(taken, [parts for _, parts in claims])
        self._filled = [[] for _ in self._forms]
        for box, (number, _), slots in zip(taken, claims, laid_out, strict=True):
            if slots:
                self._filled[number].append(Filled(box, slots))
        if not any(laid_out):
            self._offered = taken
        else:
            pairs = zip(taken, laid_out, strict=True)
            self._offered = KnownBoxes(part for box, slots in pairs for part in slots or [box])
        if isinstance(taken, KnownBoxes):
            self._known = taken, changes

    def _claimed(self, box: SourceBox) -> tuple[int, Sequence[SourceBox]]:
        for number, form in enumerate(self._forms):
            if parts := form.parts(box):
                return number, parts
        return 0, ()
