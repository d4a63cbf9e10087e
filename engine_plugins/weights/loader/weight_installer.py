"""The seam to an engine: its own loader, and the parameters that it serves from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.loader.coverage import LoaderRules
from engine_plugins.weights.loader.loader_trace import LoaderTrace

__all__ = ["WeightInstaller"]


class WeightInstaller(LoaderRules, Protocol):
    """What an engine must supply: its own loader, once on placeholders and once for real."""

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """Record what the engine's loader does with these tensors; touches nothing live."""
        ...

    def live_parameters(self) -> Mapping[str, torch.Tensor]:
        """The parameters that serve, by the trace's names; asked while no load is under way."""
        ...

    def begin(self) -> None:
        """Make the model ready for new weights; generation stands still from here on."""
        ...

    def install(self, modules: Sequence[str], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load whole HF tensors that fill `modules`; keeps no reference to them afterwards."""
        ...

    def landed(self, modules: Sequence[str]) -> None:
        """Take note that the live parameters of `modules` were written without `install`."""
        ...

    def finish(self) -> None:
        """End the load; every derived copy is of the new weights."""
        ...

    def abandon(self) -> None:
        """Leave a model that can be loaded again, after a failure between begin and finish."""
        ...
