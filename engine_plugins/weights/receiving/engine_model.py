"""What one rank has found out about its engine's model: what the loader does, and what may land."""

from __future__ import annotations

from collections.abc import Sequence

from engine_plugins.errors import ConflictError
from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import SourceBox
from engine_plugins.weights.loader.destination import destination_map
from engine_plugins.weights.loader.loader_trace import LoaderTrace
from engine_plugins.weights.loader.weight_installer import WeightInstaller
from engine_plugins.weights.receiving.landing import Landing
from engine_plugins.weights.receiving.peer_source import peer_boxes

__all__ = ["EngineModel"]


class EngineModel:
    """The trace of the loader and the landing that follows from it, kept from update to update.

    Args:
        installer: the engine's side of loading.
    """

    def __init__(self, installer: WeightInstaller) -> None:
        self._installer = installer
        self._traced: tuple[tuple[LogicalTensor, ...], LoaderTrace, Landing] | None = None
        self._offered: tuple[Landing, list[SourceBox]] | None = None

    @property
    def landing(self) -> Landing:
        """Which modules take weights straight into their parameters, as far as it is known.

        Raises:
            ConflictError: nothing was ever connected.
        """
        if self._traced is None:
            raise ConflictError(
                "this engine has not been updated yet, and its loader is not known",
                remedy="connect sources first",
            )
        return self._traced[2]

    def trace(self, tensors: Sequence[LogicalTensor]) -> LoaderTrace:
        """What the loader does with these tensors; a trainer that connects anew has the same."""
        key = tuple(tensors)
        if self._traced is None or self._traced[0] != key:
            trace = self._installer.trace(tensors)
            self._traced = (key, trace, self._landing_of(trace, key))
        return self._traced[1]

    def look_again(self) -> bool:
        """Say whether the live parameters have moved; of those that have, nothing is known."""
        if self._traced is None or not self._traced[2].moved(self._installer.live_parameters()):
            return False
        tensors, trace, _ = self._traced
        self._traced = (tensors, trace, self._landing_of(trace, tensors))
        return True

    def forget_values(self) -> None:
        """Take the live parameters to hold nothing that was ever compared."""
        if self._traced is not None:
            (tensors, trace, _), self._traced = self._traced, None
            self._traced = (tensors, trace, self._landing_of(trace, tensors))

    def peer_boxes(self) -> list[SourceBox]:
        """What the live parameters hold of the HF tensors.

        Raises:
            ConflictError: see `peer_source.peer_boxes`.
        """
        landing = self.landing
        if self._offered is None or self._offered[0] is not landing:
            tensors = self._traced[0] if self._traced is not None else ()
            self._offered = (landing, peer_boxes(landing, tensors))
        return self._offered[1]

    def _landing_of(self, trace: LoaderTrace, tensors: Sequence[LogicalTensor]) -> Landing:
        parameters = self._installer.live_parameters()
        landing = Landing(destination_map(trace, tensors), trace.layouts, parameters)
        if self._traced is not None:
            landing.inherit(self._traced[2])
        return landing
