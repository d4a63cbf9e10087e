"""Which modules of one engine rank take weights straight into their live parameters.

The destination map says where the loader would put them; whether the parameter that serves has
that layout too, only its values show: packed weights may keep their shape. So a module is let in
once its parameters were seen to hold, after the engine's own load of it, just what the map says;
values that would look the same in another layout show nothing (`telling_values.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch

from engine_plugins.weights.loader.destination import DestinationBox, DestinationMap
from engine_plugins.weights.loader.loader_trace import ParameterLayout
from engine_plugins.weights.loader.telling_values import pattern_like, tell_places_apart
from engine_plugins.weights.planning.box_table import LiveBox

__all__ = ["Landing"]

_NOT_SEEN = "its live parameters were not yet compared with what the loader makes of them"
_NOT_TOLD = "its values would look the same in another layout"
_seeds = itertools.count()
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Place(NamedTuple):
    """Where one box of a tensor lies in a live parameter."""

    box: DestinationBox
    view: torch.Tensor


class Landing:
    """The way in of every module, as far as it is known.

    Args:
        destination: the map of this rank.
        layouts: what the loader writes to, by parameter.
        parameters: the live ones.

    Attributes:
        reasons: by module, why it goes through the loader.
    """

    def __init__(
        self,
        destination: DestinationMap,
        layouts: Mapping[str, ParameterLayout],
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        self.reasons: dict[str, str] = dict(destination.reasons)
        self._places: dict[str, list[_Place]] = {}
        self._proven: set[str] = set()
        self._parameters = {name: parameters[name] for name in layouts if name in parameters}
        self._addresses = _addresses(self._parameters)
        for module, boxes in destination.boxes.items():
            wrong = _differs(boxes, layouts, parameters)
            self.reasons[module] = wrong or _NOT_SEEN
            if not wrong:
                self._places[module] = [_place(box, layouts, parameters) for box in boxes]

    @property
    def proven(self) -> AbstractSet[str]:
        """Modules whose live parameters hold the loader's layout."""
        return self._proven

    def memory(self) -> list[torch.Tensor]:
        """The live parameters of the proven modules."""
        return [place.view for module in self._proven for place in self._places[module]]

    def places(self) -> list[tuple[DestinationBox, torch.Tensor]]:
        """Every box of a proven module, and the view of live memory that holds it."""
        known = [places for module, places in self._places.items() if module in self._proven]
        return [(place.box, place.view) for places in known for place in places]

    def moved(self, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Whether the live parameters are no longer where they were."""
        return (
            _addresses({name: parameters[name] for name in self._parameters if name in parameters})
            != self._addresses
        )

    def inherit(self, other: Landing) -> None:
        """Take over what another landing has proven of the same boxes in the same memory."""
        if other.moved(self._parameters):
            return
        for module in other.proven & self._places.keys():
            if _boxes(self._places[module]) == _boxes(other._places[module]):
                self._admit(module)

    def compare(self, modules: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Compare modules with the HF tensors that the engine has just loaded into them.

        One whose values differ never lands; one that they show nothing of may be compared again.
        """
        for module in modules:
            if module in self._proven or module not in self._places:
                continue
            different = [p for p in self._places[module] if not _same_bits(*_pair(p, tensors))]
            if different:
                names = ", ".join(sorted({place.box.parameter for place in different})[:4])
                self.reasons[module] = f"{names} holds other values than the loader copied"
                del self._places[module]
            elif self._mute(module, tensors):
                self.reasons[module] = _NOT_TOLD
            else:
                self._admit(module)

    def pattern(
        self, modules: Iterable[str], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Values to load and compare in place of tensors that were equal and show nothing.

        Empty where there are no such tensors. Loading them spoils the modules: load them again.
        """
        unclear = [m for m in modules if m in self._places and m not in self._proven]
        mute = [name for module in unclear for name in self._mute(module, tensors)]
        return {
            name: pattern_like(tensors[name], seed=next(_seeds)) for name in dict.fromkeys(mute)
        }

    def _mute(self, module: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Tensors of a module in whose parameters places cannot be told apart."""
        by_parameter: dict[str, list[_Place]] = {}
        for place in self._places[module]:
            by_parameter.setdefault(place.box.parameter, []).append(place)
        return [
            place.box.tensor
            for places in by_parameter.values()
            if not tell_places_apart([_pair(place, tensors)[1] for place in places])
            for place in places
        ]

    def copy(self, modules: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put HF tensors into the live parameters of proven modules, as the loader would."""
        for module in modules:
            for place in self._places[module]:
                target, source = _pair(place, tensors)
                target.copy_(source)

    def _admit(self, module: str) -> None:
        self._proven.add(module)
        del self.reasons[module]

    def live_boxes(self, modules: Iterable[str]) -> dict[str, list[LiveBox]]:
        """Where the tensors of proven modules go, by tensor."""
        found: dict[str, list[LiveBox]] = {}
        for module in modules:
            for box, view in self._places[module]:
                item = view.element_size()
                strides = tuple(stride * item for stride in box.strides)
                live = LiveBox(box.start, box.shape, view.data_ptr(), strides)
                found.setdefault(box.tensor, []).append(live)
        return found


def _boxes(places: Sequence[_Place]) -> set[DestinationBox]:
    return {place.box for place in places}


def _differs(
    boxes: Sequence[DestinationBox],
    layouts: Mapping[str, ParameterLayout],
    parameters: Mapping[str, torch.Tensor],
) -> str | None:
    for name in dict.fromkeys(box.parameter for box in boxes):
        live, wanted = parameters.get(name), layouts[name]
        if live is None:
            return f"{name} is not among the live parameters"
        found = ParameterLayout.of(live)
        if found._replace(offset=0) != wanted._replace(offset=0):
            return (
                f"{name} is loaded as {wanted.shape} {wanted.dtype} with strides "
                f"{wanted.strides} and serves as {found.shape} {found.dtype} with {found.strides}"
            )
    return None


def _place(
    box: DestinationBox,
    layouts: Mapping[str, ParameterLayout],
    parameters: Mapping[str, torch.Tensor],
) -> _Place:
    live = parameters[box.parameter].detach()
    offset = live.storage_offset() + box.offset - layouts[box.parameter].offset
    return _Place(box, live.as_strided(box.shape, box.strides, offset))


def _pair(place: _Place, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    box = place.box
    of = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
    return place.view, tensors[box.tensor][of]


def _same_bits(live: torch.Tensor, loaded: torch.Tensor) -> bool:
    """Equality that NaNs keep."""
    bits = _BITS[live.element_size()]
    return torch.equal(live.view(bits), loaded.to(live.device).view(bits))


def _addresses(parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (each.data_ptr(), each.nbytes) for name, each in parameters.items()}
