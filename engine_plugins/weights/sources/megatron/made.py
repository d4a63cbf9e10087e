"""Copies of parameters that no view of the trainer's memory can be: HF holds other values or rows.

They are filled whenever boxes are asked for, so once for every update, and stay where they are for
as long as somebody offers them.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

__all__ = ["MadeTensors"]


class MadeTensors:
    """The copies of one process, found again by what they are copies of.

    Nothing is held here: who lets go of a copy frees it, and the next look makes it anew.
    """

    def __init__(self) -> None:
        self._copies: WeakValueDictionary[object, torch.Tensor] = WeakValueDictionary()
        self._awaited: set[torch.device] = set()

    def begin(self) -> None:
        """Forget which devices have been waited for: the trainer may have gone on."""
        self._awaited.clear()

    def copy(self, key: tuple[object, ...], values: torch.Tensor) -> torch.Tensor:
        """Values, computed or in another order, as contiguous memory that stays.

        Args:
            key: whose they are; together with their shape, dtype and device.
            values: on their device; what computes them may still run.
        """
        whole = (*key, values.shape, values.dtype, values.device)
        held = self._copies.get(whole)
        if held is None:
            held = torch.empty(values.shape, dtype=values.dtype, device=values.device)
            self._copies[whole] = held
        held.copy_(values)
        return held

    def wait_for(self, parameter: torch.Tensor) -> None:
        """Let the work end that is queued for a parameter, on any stream: an optimizer's step."""
        if parameter.is_cuda and parameter.device not in self._awaited:
            torch.cuda.synchronize(parameter.device)
            self._awaited.add(parameter.device)
