"""An engine's release against what we rely on, found in its sources without an import."""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_plugins.engine_release import GATE, UPDATES, EngineNames, EngineRelease, gate_refusal
from engine_plugins.engine_sources import EngineSources
from engine_plugins.errors import UnsupportedError
from engine_plugins.settings import Settings

SOURCES = {
    "engine/__init__.py": "from engine.core import Core as Engine\nfrom .parts import *\n",
    "engine/core.py": """
import abc
from typing import TYPE_CHECKING
from . import parts
from .parts.base import Base
from torch import nn

if TYPE_CHECKING:
    platform: object
try:
    LIMIT = 1
except ImportError:
    OTHER = 2

class Core(parts.Mixin, Base[int], abc.ABC):
    field: int = 0

    def __init__(self, a):
        self.queue, self.other = a, a
        self.paused: bool = False
        a.foreign = 1

    def step(self, batch, more=None): ...

    async def waits(self): ...
""",
    "engine/parts/__init__.py": "class Mixin:\n    def mixed(self): self.late = 1\n",
    "engine/parts/base.py": "class Base:\n    def below(self, *, x): ...\n",
}


@pytest.fixture(params=["folder", "wheel"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineSources]:
    if request.param == "folder":
        for name, text in SOURCES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        yield EngineSources(tmp_path, "engine")
        return
    with zipfile.ZipFile(tmp_path / "engine.whl", "w") as wheel:
        for name, text in SOURCES.items():
            wheel.writestr(name, text)
    with zipfile.ZipFile(tmp_path / "engine.whl") as wheel:
        yield EngineSources(zipfile.Path(wheel), "engine")


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("engine.core", "Core.step"),
        ("engine.core", "Core.field"),
        ("engine.core", "Core.paused"),
        ("engine.core", "Core.queue"),
        ("engine.core", "Core.mixed"),  # of a class above it
        ("engine.core", "Core.late"),
        ("engine.core", "Core.below"),
        ("engine", "Engine.step"),  # under another name
        ("engine", "Mixin.mixed"),  # by a star
        ("engine.core", "LIMIT"),
        ("engine.core", "OTHER"),
        ("engine.core", "platform"),
        ("engine.core", "nn"),
        ("engine", "parts.Mixin"),
        ("engine.parts", "base.Base"),
    ],
)
def test_a_name_is_found(sources: EngineSources, module: str, path: str) -> None:
    """Wherever the sources say that it comes from."""
    assert sources.find(module, path) is not None


@pytest.mark.parametrize(
    ("module", "path"),
    [
        ("engine.core", "Core.foreign"),
        ("engine.core", "Core.gone"),
        ("engine.core", "step"),
        ("engine.core", "LIMIT.step"),
        ("engine.gone", "Core"),
        ("engine", "Gone"),
    ],
)
def test_a_name_that_is_not_there_is_not_found(
    sources: EngineSources, module: str, path: str
) -> None:
    """An attribute of another object is none of the class."""
    assert sources.find(module, path) is None


def test_a_function_is_found_as_itself(sources: EngineSources) -> None:
    """Its signature is needed."""
    assert isinstance(sources.find("engine.core", "Core.step"), ast.FunctionDef)


def _release(gate: str = "Core.mixed(self)", updates: str = "Core: queue") -> EngineRelease:
    return EngineRelease(
        engine="Engine",
        package="engine",
        version="2.1",
        probed=("2.0",),
        names={
            UPDATES: EngineNames(hooked={}, used={"engine.core": (updates, "LIMIT, nn")}),
            GATE: EngineNames(hooked={"engine.core": (gate,)}, used={}),
        },
    )


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("Core: queue, gone", "has no engine.core.Core.gone"),
        ("Core.gone(self)", "has no engine.core.Core.gone(self)"),
        (
            "Core.step(self, batch, *, other)",
            "has engine.core.Core.step(self, batch, more=...), not (self, batch, *, other)",
        ),
        ("Core.paused(self)", "has engine.core.Core.paused, which is no function (self)"),
        (
            "async Core.mixed(self)",
            "has engine.core.Core.mixed(self), not async (self)",
        ),
        ("Core.waits(self)", "has engine.core.Core.waits async (self), not (self)"),
        ("async Core.waits(me)", "has engine.core.Core.waits async (self), not async (me)"),
        ("async Core.gone(self)", "has no engine.core.Core.gone async (self)"),
    ],
)
def test_a_difference_names_what_is_seen_and_what_is_wanted(
    sources: EngineSources, wanted: str, said: str
) -> None:
    """So that nobody has to look for it."""
    assert _release(updates=wanted).differences(UPDATES, sources) == [said]


@pytest.fixture
def installed(sources: EngineSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineSources, "installed", lambda package: sources)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENGINE_PLUGINS")}
    monkeypatch.setattr(os, "environ", environment)


@pytest.mark.usefixtures("installed")
def test_a_release_that_fits_is_taken() -> None:
    """With and without the gate."""
    _release().check(Settings(prefill_gate="enforce"))
    assert gate_refusal() is None


@pytest.mark.usefixtures("installed")
def test_what_updates_need_refuses_the_start() -> None:
    """In one line with the name and the releases that have it."""
    release = _release(updates="Core: gone, gone_too")
    with pytest.raises(UnsupportedError) as refused:
        release.check(Settings())
    assert refused.value.message == (
        "Engine 2.1 has no engine.core.Core.gone (and 1 more), which engine-plugins needs for "
        "weight updates: Engine 2.0 has it"
    )


@pytest.mark.usefixtures("installed")
def test_what_the_gate_alone_needs_refuses_the_gate_alone() -> None:
    """Where it is off all processes are told; where it is asked for nothing starts."""
    release = _release(gate="Core.step(self, batch)")
    with pytest.raises(UnsupportedError, match="needs for the prefill gate"):
        release.check(Settings(prefill_gate="observe"))
    assert gate_refusal() is None
    release.check(Settings())
    refused = gate_refusal()
    assert refused is not None
    assert "more=...), not (self, batch)" in refused.message
    assert refused.remedy == "use Engine 2.0, or a newer engine-plugins"
    _release().check(Settings())  # the next server of this process
    assert gate_refusal() is None


def test_a_release_that_nobody_ran_is_said() -> None:
    """Names and signatures are not behaviour."""
    assert "this is 2.1" in str(_release().warning())
