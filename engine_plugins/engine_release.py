"""The gate in front of an engine's release: what we rely on, and whether it is all there.

Each engine folder describes its engine once (`versions.py`). The first process of a server compares
the description with the engine's sources, before anything of it is hooked.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine_plugins.engine_sources import EngineSources
from engine_plugins.errors import UnsupportedError
from engine_plugins.settings import PREFIX, Settings
from engine_plugins.signatures import fits_call, fits_hook, signature_of, signature_written

__all__ = ["GATE", "UPDATES", "EngineNames", "EngineRelease", "gate_refusal"]

UPDATES = "weight updates"
"""What every server with our extension has."""
GATE = "the prefill gate"

_ASYNC = "async "
_NO_GATE = PREFIX + "NO_PREFILL_GATE"
"""Variable that tells all processes of a server why there can be no gate."""


@dataclass(frozen=True, kw_only=True)
class EngineNames:
    """Names of an engine that a part of us relies on, by the module that we find them in.

    An entry is a function with its signature, behind `async` if that is how it is defined,
    `Class: attribute, attribute`, or names that need only be there, `name, Class.name`.

    Attributes:
        hooked: functions that we wrap or replace, with what ours takes: `*args` and `**kwargs` are
            handed on, and without them the engine's may take nothing else.
        used: all other names; functions with what we pass, after `*` by keyword.
    """

    hooked: Mapping[str, Sequence[str]]
    used: Mapping[str, Sequence[str]]

    def __iter__(self) -> Iterator[tuple[str, str, str | None, bool]]:
        """Each name: its module, its path there, what is wanted of its signature, if hooked."""
        for hooked, names in ((True, self.hooked), (False, self.used)):
            for module, entries in names.items():
                for entry in entries:
                    for path, wanted in _read(entry):
                        yield module, path, wanted, hooked


@dataclass(frozen=True, kw_only=True)
class EngineRelease:
    """An installed engine, the releases that we were run on, and the names that we rely on.

    Attributes:
        engine: its name, as messages say it.
        package: its name, as Python imports it.
        version: the version that is installed.
        probed: beginnings of the versions on which every hook was run, not read.
        names: by the part of us that needs them, `UPDATES` or `GATE`.
    """

    engine: str
    package: str
    version: str
    probed: Sequence[str]
    names: Mapping[str, EngineNames]

    @property
    def is_probed(self) -> bool:
        """Whether this very release was run with our hooks."""
        return any(f"{self.version}.".startswith(f"{release}.") for release in self.probed)

    @property
    def hooked(self) -> set[str]:
        """All functions that we wrap or replace, as `module.path`."""
        names = (each for part in self.names.values() for each in part)
        return {f"{module}.{path}" for module, path, _, hooked in names if hooked}

    def differences(self, part: str, sources: EngineSources) -> list[str]:
        """What of a part's names is not as we need it in some release, one line for each."""
        found = (_difference(sources, *name) for name in self.names[part])
        return [each for each in found if each is not None]

    def check(self, settings: Settings) -> None:
        """Check the installed release, in the first process of a server with our extension.

        Raises:
            UnsupportedError: names what is missing or different, and the releases that have it.
        """
        sources = EngineSources.installed(self.package)
        self._require(UPDATES, sources)
        self.check_gate(settings, sources)

    def check_gate(self, settings: Settings, sources: EngineSources | None = None) -> None:
        """Check what the prefill gate needs; where it is off, only have all processes know.

        Raises:
            UnsupportedError: the gate is asked for, and this release does not fit it.
        """
        os.environ.pop(_NO_GATE, None)
        try:
            self._require(GATE, sources or EngineSources.installed(self.package))
        except UnsupportedError as error:
            if settings.prefill_gate != "off":
                raise
            os.environ[_NO_GATE] = f"{error.message}; {error.remedy}"

    def _require(self, part: str, sources: EngineSources) -> None:
        found = self.differences(part, sources)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UnsupportedError(
                f"{self.engine} {self.version} {found[0]}{more}, which engine-plugins needs for "
                f"{part}: {self.engine} {', '.join(self.probed)} has it",
                remedy=f"use {self.engine} {', '.join(self.probed)}, or a newer engine-plugins",
            )

    def warning(self) -> str | None:
        """What to say at start about a release that nobody has tried; None for a probed one."""
        if self.is_probed:
            return None
        return (
            f"engine-plugins was probed on {self.engine} {', '.join(self.probed)}; this is "
            f"{self.version}. Its names are all there, but nobody has run them: compare tokens "
            "after a first update with those of a fresh server"
        )


def gate_refusal() -> UnsupportedError | None:
    """Why this server can have no prefill gate, if the first process found a reason."""
    told = os.environ.get(_NO_GATE)
    if told is None:
        return None
    message, _, remedy = told.rpartition("; ")
    return UnsupportedError(message, remedy=remedy)


def _read(entry: str) -> Iterator[tuple[str, str | None]]:
    """The paths of an entry, and of a function what is wanted of its signature."""
    if "(" in entry:
        path, _, wanted = entry.removeprefix(_ASYNC).partition("(")
        yield path, (f" {_ASYNC}(" if entry.startswith(_ASYNC) else "(") + wanted
    else:
        owner, colon, names = entry.rpartition(": ")
        for name in names.split(", "):
            yield f"{owner}.{name}" if colon else name, None


def _difference(
    sources: EngineSources, module: str, path: str, wanted: str | None, hooked: bool
) -> str | None:
    found = sources.find(module, path)
    if found is None:
        return f"has no {module}.{path}{wanted or ''}"
    if wanted is None:
        return None
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"has {module}.{path}, which is no function {wanted}"
    # A call of one that is no longer async would be awaited, or the other way round.
    kind, _, parameters = wanted.partition("(")
    seen_kind = f" {_ASYNC}" if isinstance(found, ast.AsyncFunctionDef) else ""
    fits = fits_hook if hooked else fits_call
    seen = signature_of(found)
    if kind == seen_kind and fits(seen, signature_written(f"({parameters}")):
        return None
    shown = str(seen).replace("=Ellipsis", "=...")
    return f"has {module}.{path}{seen_kind}{shown}, not {wanted.strip()}"
