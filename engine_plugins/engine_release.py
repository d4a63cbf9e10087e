"""The gate in front of an engine's release: what was probed, and whether it is all there.

Each engine folder describes its engine once (`versions.py`); every hook of ours checks its part
of that description before it touches anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from engine_plugins.errors import UnsupportedError

__all__ = ["EngineRelease"]


@dataclass(frozen=True, kw_only=True)
class EngineRelease:
    """An installed engine, and the releases and names that a set of hooks was made for.

    Attributes:
        engine: its name, as messages say it.
        version: the version that is installed.
        probed: beginnings of the versions on which every hook was run, not read.
        hooks: dotted names that we rely on, by the module that holds them.
    """

    engine: str
    version: str
    probed: Sequence[str]
    hooks: Mapping[str, Sequence[str]]

    @property
    def is_probed(self) -> bool:
        """Whether this very release was run with our hooks."""
        return any(f"{self.version}.".startswith(f"{release}.") for release in self.probed)

    def check(self, *modules: str) -> None:
        """Check that what we rely on in some modules is where we expect it.

        Raises:
            UnsupportedError: names the hook that is missing and the releases that have it.
        """
        for module in modules:
            for path in self.hooks[module]:
                if not _has(module, path):
                    raise UnsupportedError(
                        f"{self.engine} {self.version} has no {module}.{path}, which "
                        "engine-plugins needs",
                        remedy=f"use {self.engine} {', '.join(self.probed)}, or a newer "
                        "engine-plugins",
                    )

    def warning(self) -> str | None:
        """What to say at start about a release that nobody has tried; None for a probed one."""
        if self.is_probed:
            return None
        return (
            f"engine-plugins was probed on {self.engine} {', '.join(self.probed)}; this is "
            f"{self.version}. Its hooks are all there, but nobody has run them: compare tokens "
            "after a first update with those of a fresh server"
        )


def _has(module: str, path: str) -> bool:
    try:
        found: object = import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None
