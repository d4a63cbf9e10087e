"""The engines that the contract suite runs over: those that this environment can import."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support.engine_server import EngineServer
from tests.support.in_memory_server import in_memory_server
from tests.support.sglang_server import sglang_server
from tests.support.vllm_server import vllm_server

__all__ = [
    "ADMIN_KEY",
    "API_KEY",
    "IN_MEMORY",
    "SGLANG",
    "VLLM",
    "Engine",
    "engine_parameters",
    "engines_here",
    "only",
    "real_engines_here",
]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How to serve with an engine, and the few numbers in which engines may differ.

    Attributes:
        kind: as State says it.
        serve: starts a server for as long as a context lasts.
        peak_modules: bound of an update's memory, in the model's largest modules.
        long_pull_s: how long a pull is held while everything else must go on.
        watched: options under which a server's installs can be held; see `stepping`.
        feeds_peers: whether, on the CPU, its live parameters hold what its loader copies.
        keyed: options that set every key of the engine's own.
        environment: what else its servers are started with.
    """

    kind: str
    serve: Callable[..., AbstractContextManager[EngineServer]]
    peak_modules: float
    long_pull_s: float = 4.0
    watched: Mapping[str, Any] = field(default_factory=dict)
    feeds_peers: bool = True
    keyed: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    sleep_cycles: int = 25
    """Of one server; together 50 on real engines."""


API_KEY, ADMIN_KEY = "the-engines-own-key", "the-engines-own-admin-key"

IN_MEMORY = Engine(
    kind="in_memory",
    serve=in_memory_server,
    peak_modules=1.5,
    long_pull_s=2.0,
    sleep_cycles=4,
    keyed={"api_key": API_KEY},
)
VLLM = Engine(
    kind="vllm",
    serve=functools.partial(vllm_server, preload=True),
    # The receive buffer, the materialised layer, and the CPU's packed copy.
    peak_modules=3.5,
    watched={"extension": "tests.support.stepping_vllm.SteppingWorkerExtension"},
    feeds_peers=False,  # its linear layers are packed
    environment={"VLLM_SERVER_DEV_MODE": "1"},  # all routes of its own are there
    keyed={"api_key": API_KEY},
)
SGLANG = Engine(
    kind="sglang",
    serve=functools.partial(
        sglang_server, arguments=["--engine-plugins-enable", "--enable-metrics"], preload=True
    ),
    peak_modules=1.5,
    watched={"launcher": "tests.support.stepping_sglang"},
    keyed={"api_key": API_KEY, "admin_api_key": ADMIN_KEY},
)


def engines_here() -> list[Engine]:
    """Every engine that is installed; the one in memory in vLLM's environment alone.

    It is the same in both environments, and its suite takes minutes.
    """
    installed = [engine for engine in (VLLM, SGLANG) if find_spec(engine.kind) is not None]
    return [IN_MEMORY, *installed] if VLLM in installed or not installed else installed


def real_engines_here() -> list[Engine]:
    """Every engine that is installed, without the one in memory."""
    return [each for each in engines_here() if each is not IN_MEMORY]


def engine_parameters(engines: Sequence[Engine]) -> list[Any]:
    """Engines as parameters of a test or a fixture, with the marks that say where it is run."""
    return [
        pytest.param(
            each,
            id=each.kind,
            marks=pytest.mark.core if each is IN_MEMORY else pytest.mark.engine,
        )
        for each in engines
    ]


def only(*engines: Engine) -> pytest.MarkDecorator:
    """Run a test, or a module's tests, on these engines and no others."""
    return pytest.mark.parametrize("engine", engine_parameters(engines))
