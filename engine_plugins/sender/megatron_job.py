"""The Megatron ranks of one job: what a process plays, and that all are of one shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import nn

from engine_plugins.errors import SourceError
from engine_plugins.weights.sources.megatron.gather import parameter_gathers
from engine_plugins.weights.sources.megatron.rank import MegatronRank

__all__ = ["MegatronRanks", "Place", "check_topology", "gathers_of", "ranks_of"]

MegatronRanks = MegatronRank | Sequence[MegatronRank] | Sequence[nn.Module]
"""One rank; several, of a process that plays them; or the model chunks of this process's rank."""

Place = tuple[str, str]
"""A rank's place, and the sizes of its job's groups."""


def ranks_of(given: MegatronRanks) -> list[MegatronRank]:
    """What this process holds of a Megatron model, as it is now.

    Raises:
        NotConfiguredError: model chunks without Megatron's parallel state.
        SourceError: a chunk that cannot be read.
    """
    parts = [given] if isinstance(given, MegatronRank) else list(given)
    chunks = [part for part in parts if isinstance(part, nn.Module)]
    ranks = [part for part in parts if isinstance(part, MegatronRank)]
    return [*ranks, MegatronRank.from_model(chunks)] if chunks else ranks


def gathers_of(given: MegatronRanks, members: Collection[int]) -> list[Callable[[], None]]:
    """What brings this process's parameters up to date; see `parameter_gathers`."""
    parts = [given] if isinstance(given, MegatronRank) else list(given)
    modules: list[nn.Module] = []
    for part in parts:
        if isinstance(part, nn.Module):
            modules.append(part)
        elif isinstance(part, MegatronRank):
            modules += [chunk.module for chunk in part.chunks if chunk.module is not None]
    return parameter_gathers(modules, members)


def check_topology(places: Sequence[Place]) -> None:
    """Check that the ranks of all processes are of a job of one shape.

    Raises:
        SourceError: names the first rank that differs, and both shapes.
    """
    for place, sizes in places:
        first, wanted = places[0]
        if sizes != wanted:
            raise SourceError(
                f"the Megatron rank at {place} is of a job with {sizes}, but that at {first} of "
                f"one with {wanted}",
                remedy="give every rank the sizes of the same job",
            )
