"""Whether a loader that is called once for each module does what one call for all would do.

A loader may end with something that it does to all layers: scale norms in place, or count whether
every expert came. Called again and again it would scale them again and again, or raise when half of
the weights are new.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from engine_plugins.errors import UnsupportedError, WeightMismatchError
from engine_plugins.weights.loader.loader_watch import TracedCopy, WatchedCopies
from engine_plugins.weights.loader.numbered_names import kind_of

__all__ = ["refuse_unless_in_parts"]


def refuse_unless_in_parts(
    copies: Sequence[TracedCopy],
    names_of: Mapping[str, Sequence[str]],
    run: Callable[[Container[str]], WatchedCopies],
) -> None:
    """Load one module of each kind alone, on placeholders.

    Args:
        copies: of one call of the loader with all tensors.
        names_of: by module, the tensors that fill it.
        run: calls the loader with the tensors of some names.

    Raises:
        UnsupportedError: that raises, or changes parameters of other modules.
    """
    computed = {copy.parameter for copy in copies if copy.sources and copy.read is None}
    for modules, names in _one_of_each_kind(names_of):
        try:
            seen = run(names)
        except WeightMismatchError as error:
            raise UnsupportedError(
                f"the engine's loader does not load {sorted(modules)[0]} alone: {error.message}",
                remedy="restart the engine with the new weights",
            ) from error
        changed = seen.changed | (seen.overwritten & computed)
        others = sorted(name for name in changed if name.rpartition(".")[0] not in modules)
        if others:
            raise UnsupportedError(
                "whenever the engine's loader loads something, it changes what it has loaded into "
                f"{', '.join(others[:4])}; it cannot load module by module",
                remedy="restart the engine with the new weights",
            )


def _one_of_each_kind(
    names_of: Mapping[str, Sequence[str]],
) -> Iterator[tuple[set[str], set[str]]]:
    """Modules that are loaded together, and their tensors; one of those that differ by number."""
    modules_of: dict[str, set[str]] = {}
    for module, names in names_of.items():
        for name in names:
            modules_of.setdefault(name, set()).add(module)
    kinds: set[str] = set()
    for module in names_of:
        kind = kind_of(module)
        if kind in kinds or not names_of[module]:
            continue
        kinds.add(kind)
        together, tensors = {module}, set(names_of[module])
        while more := {each for name in tensors for each in modules_of[name]} - together:
            together |= more
            tensors |= {name for each in more for name in names_of[each]}
        yield together, tensors
