"""Sending a part of a model: which of its tensors, by their checkpoint names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from engine_plugins.errors import SourceError
from engine_plugins.weights.boxes.placement import SourceBox

__all__ = ["Only"]


class Only:
    """Patterns of checkpoint names, as file names are matched (`model.layers.*`, `*.bias`).

    Args:
        patterns: one or several; a tensor is sent that matches any.

    Raises:
        SourceError: none, or something else than text.
    """

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not self.patterns or not all(isinstance(each, str) for each in self.patterns):
            raise SourceError(
                f"only is {patterns!r}, which chooses nothing",
                remedy="give patterns of the tensors' names, or leave it out to send all",
            )

    def chooses(self, name: str) -> bool:
        """Whether a tensor of this name is sent."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def besides(self, endings: Iterable[str]) -> Only:
        """What chooses names with these endings too."""
        return Only([*self.patterns, *(f"*{ending}" for ending in endings)])

    def of(self, boxes: Sequence[SourceBox]) -> Sequence[SourceBox]:
        """Those that are sent; the same object if all are: it may be known not to have moved."""
        names = {box.name for box in boxes}
        chosen = {name for name in names if self.chooses(name)}
        return boxes if chosen == names else [box for box in boxes if box.name in chosen]

    def idle(self, names: Collection[str]) -> list[str]:
        """Patterns that match none of these."""
        return [
            pattern
            for pattern in self.patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]

    def refuse_idle(self, idle: Sequence[Sequence[str]]) -> None:
        """Refuse patterns that match nothing: what they were meant for would stay behind.

        Args:
            idle: of every rank, see `idle`.

        Raises:
            SourceError: a pattern is idle on all.
        """
        everywhere = [each for each in self.patterns if all(each in ranks for ranks in idle)]
        if everywhere:
            raise SourceError(
                f"only={everywhere} matches no tensor, so what it is meant for would not be sent",
                remedy="give names as the checkpoint has them (`model.layers.0.mlp.*`)",
            )
