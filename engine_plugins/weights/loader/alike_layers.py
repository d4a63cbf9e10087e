"""Layers that differ by their number alone: a loader is shown three of a kind, and speaks for all.

A model's layers are mostly copies of each other, and so is what a loader does with them. Layers
are told apart by the first number in a name, on the engine's side as on the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from engine_plugins.weights.loader.loader_watch import TracedCopy

__all__ = ["AlikeLayers"]

_NAME = re.compile(r"(\D*)(\d+)(.*)", re.DOTALL)
_SHOWN = 3


class _Layer(NamedTuple):
    """One layer of the checkpoint: its number as written, and its tensors as they are fed."""

    number: str
    tensors: list[int]


class _Entry(NamedTuple):
    """A copy with the layer's number taken out: the same in every layer of a kind."""

    tensors: tuple[int, ...]
    """Its sources, by their places in the layer."""
    parameter: tuple[str, ...]
    """The name in two parts, around the number; in one where the number is not in it."""
    bare: TracedCopy
    """The copy without these names."""


class AlikeLayers:
    """Which tensors a loader has to be shown, and what follows from its copies of them.

    Layers are of one kind if their tensors have the same names but for the number, the same kinds
    and the same order, and the engine holds the same parameters under the number. So layers that
    another pipeline stage has are a kind of their own.

    Args:
        tensors: names in the order in which they are fed, and what else must be equal.
        held: the engine's parameters by name, and what else must be equal.

    Attributes:
        first: places of tensors that have no equal before them, in the order in which they are fed.
        samples: places of all tensors but those of layers that are written from others': of each
            kind with more than three layers the first, the middle and the last are shown.
    """

    def __init__(
        self, tensors: Sequence[tuple[str, Hashable]], held: Mapping[str, Hashable]
    ) -> None:
        self._names = [name for name, _ in tensors]
        under = _by_number(held)
        layers: dict[tuple[str, str], tuple[_Layer, list[Hashable]]] = {}
        seen: dict[Hashable, int] = {}
        for place, (name, kind) in enumerate(tensors):
            found = _NAME.match(name)
            if found is None:
                seen[name] = place
                continue
            before, number, after = found.groups()
            layer, kinds = layers.setdefault((before, number), (_Layer(number, []), []))
            layer.tensors.append(place)
            kinds.append((after, kind))
            seen.setdefault((before, after, kind, under.get(number)), place)
        alike: dict[Hashable, list[_Layer]] = {}
        for (before, number), (layer, kinds) in layers.items():
            alike.setdefault((before, tuple(kinds), under.get(number)), []).append(layer)
        self._kinds = [_shown_first(kind) for kind in alike.values() if len(kind) > _SHOWN]
        unseen = {place for kind in self._kinds for n in kind[_SHOWN:] for place in n.tensors}
        self.first = sorted(seen.values())
        self.samples = [place for place in range(len(tensors)) if place not in unseen]

    def completed(self, copies: Sequence[TracedCopy]) -> list[TracedCopy] | None:
        """The copies of all tensors, in the loader's order, from those of the samples.

        None where one does not follow from the other: the samples of a kind were not treated
        alike, or the loader does not go through the tensors in their order.
        """
        place_of = {self._names[place]: place for place in self.samples}
        ordered = _in_order(copies, place_of)
        if ordered is None:
            return None
        by_layer = self._by_layer(copies, place_of)
        if by_layer is None:
            return None
        for kind in self._kinds:
            shown = [by_layer.get(id(layer), []) for layer in kind[:_SHOWN]]
            if any(entries != shown[0] for entries in shown):
                return None
            for layer in kind[_SHOWN:]:
                ordered.extend(self._written(layer, shown[0]))
        ordered.sort(key=lambda each: each[0])
        return [copy for _, copy in ordered]

    def _by_layer(
        self, copies: Sequence[TracedCopy], place_of: Mapping[str, int]
    ) -> dict[int, list[_Entry]] | None:
        """Entries of each layer that is shown for others; None where a copy joins two layers.

        A constant belongs to the layer whose tensors fill its parameter.
        """
        home = {
            place: (layer, index)
            for kind in self._kinds
            for layer in kind[:_SHOWN]
            for index, place in enumerate(layer.tensors)
        }
        filled_by = {
            copy.parameter: home[place_of[copy.sources[0]]][0]
            for copy in copies
            if copy.sources and place_of[copy.sources[0]] in home
        }
        found: dict[int, list[_Entry]] = {}
        for copy in copies:
            at = [home.get(place_of[name]) for name in copy.sources]
            layers = {id(each[0]): each[0] for each in at if each is not None}
            if not at and copy.parameter in filled_by:
                layers = {id(filled_by[copy.parameter]): filled_by[copy.parameter]}
            if len(layers) > 1 or (layers and None in at):
                return None
            for key, layer in layers.items():
                indices = tuple(each[1] for each in at if each is not None)
                found.setdefault(key, []).append(_entry(copy, layer.number, indices))
        return found

    def _written(
        self, layer: _Layer, entries: Iterable[_Entry]
    ) -> Iterator[tuple[int, TracedCopy]]:
        """A layer's copies, each with the place at which the loader makes it."""
        at = layer.tensors[0]
        for tensors, parameter, bare in entries:
            places = [layer.tensors[index] for index in tensors]
            at = max(places, default=at)
            names = tuple([self._names[place] for place in places])
            yield at, bare._replace(sources=names, parameter=layer.number.join(parameter))


def _by_number(held: Mapping[str, Hashable]) -> dict[str, int]:
    """Numbers under which the engine holds something; equal values where it holds the same."""
    under: dict[str, list[Hashable]] = {}
    for name, kind in held.items():
        found = _NAME.match(name)
        if found is not None:
            under.setdefault(found[2], []).append((found[1], found[3], kind))
    same: dict[Hashable, int] = {}
    return {number: same.setdefault(tuple(kinds), len(same)) for number, kinds in under.items()}


def _shown_first(kind: Sequence[_Layer]) -> list[_Layer]:
    """The first, the middle and the last layer, then the others."""
    middle = len(kind) // 2
    return [kind[0], kind[middle], kind[-1], *kind[1:middle], *kind[middle + 1 : -1]]


def _in_order(
    copies: Sequence[TracedCopy], place_of: Mapping[str, int]
) -> list[tuple[int, TracedCopy]] | None:
    """Copies with the place of the last tensor that they need; None where that goes back.

    A constant comes with what was copied before it.
    """
    ordered: list[tuple[int, TracedCopy]] = []
    at = 0
    for copy in copies:
        place = max((place_of[name] for name in copy.sources), default=at)
        if place < at:
            return None
        at = place
        ordered.append((at, copy))
    return ordered


def _entry(copy: TracedCopy, number: str, tensors: tuple[int, ...]) -> _Entry:
    found = _NAME.match(copy.parameter)
    in_it = found is not None and found[2] == number
    parameter = (found[1], found[3]) if found is not None and in_it else (copy.parameter,)
    return _Entry(tensors, parameter, copy._replace(sources=(), parameter=""))
