"""The servers of the cases: one runs at a time, for as long as cases need it and it lives."""

from __future__ import annotations

import socket
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.admin.state import EngineState
from tests.chaos_update.cases import ServerKind
from tests.chaos_update.models import VARIANTS, Models, Oracle
from tests.chaos_update.product import python_path
from tests.support.engine_server import ROOT, EngineServer
from tests.support.sglang_server import SGLANG_SHIMS, sglang_server
from tests.support.vllm_server import vllm_server

__all__ = ["Fleet", "Target", "runtime_dirs"]

STALL_TIMEOUT_S = 4
_SGLANG = ROOT / ".venv" / "sglang" / "bin" / "python"
"""Where SGLang's servers run, unless this process could import SGLang itself."""
_WIRE = {"tcp": {"UCX_TLS": "tcp"}, "cma": dict[str, str]()}


class Target:
    """A running server, and the book of all versions that trainers ever sent to it.

    Attributes:
        kind: how it was started.
        server: as clients see it.
        weights_of: by label, the whole weights that it stands for.
        explained: what transformers says, in its dtype.
        runtime_dir: where its processes meet.
    """

    def __init__(
        self, kind: ServerKind, server: EngineServer, oracle: Oracle, runtime_dir: Path
    ) -> None:
        self.kind, self.server, self.runtime_dir = kind, server, runtime_dir
        self.explained = oracle.explained
        self.weights_of = {"default": 0}
        self._version = 0
        self._state = SharedState(runtime_dir)

    def next_version(self) -> tuple[int, int]:
        """A version that no trainer has sent, and its weights."""
        self._version += 1
        weights = self._version % VARIANTS
        self.weights_of[str(self._version)] = weights
        return self._version, weights

    def page(self) -> EngineState:
        """The state as the server's processes share it; nothing is asked."""
        return self._state.read()

    def ended(self) -> bool:
        """Whether nobody takes connections any more; its processes may take long to end."""
        url = httpx.URL(self.server.url)
        try:
            socket.create_connection((url.host, url.port or 0), timeout=5).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def lives(self, *, killed: bool = False) -> bool:
        """Whether it answers, and says itself that it is well.

        SGLang does not watch its schedulers: that one was killed shows where it is to generate. A
        fenced engine would not either, and lives.
        """
        asked = killed and self.kind.engine == "sglang" and self.page().state != "fenced"
        path = "/health_generate" if asked else "/health"
        try:
            well = httpx.get(self.server.url + path, timeout=25).status_code == 200
            return well and bool(self.server.state()["state"])
        except httpx.HTTPError:
            return False

    @property
    def environment(self) -> dict[str, str]:
        """What trainers need to meet it on its wire."""
        return _WIRE[self.kind.wire]


def runtime_dirs(temporary: Path) -> set[Path]:
    """The folders in which the processes of servers meet, of living ones and others."""
    return set(temporary.glob("engine-plugins-*"))


class Fleet:
    """Starts a server when a case needs another one than the one that runs.

    Args:
        models: what servers start with, the first of them.
        folder: for the servers' own files.
        temporary: their folder for temporary files; None for one of each server's own.
    """

    def __init__(self, models: Models, folder: Path, temporary: Path | None = None) -> None:
        self.models, self._folder, self._temporary = models, folder, temporary
        self._oracles: dict[str, Oracle] = {}
        self._stack = ExitStack()
        self._target: Target | None = None
        self.started = 0

    def target(self, kind: ServerKind) -> Target:
        """The running server of a kind."""
        if self._target is None or self._target.kind != kind:
            self.close()
            self.started += 1
            folder = self._folder / f"server-{self.started}"
            folder.mkdir()
            temporary = self._temporary or folder
            before = runtime_dirs(temporary)
            server = self._stack.enter_context(
                self._serve(kind, folder / "server.log", {"TMPDIR": str(temporary)})
            )
            runtime_dir = (runtime_dirs(temporary) - before).pop()
            self._target = Target(kind, server, self._oracle(kind.dtype), runtime_dir)
        return self._target

    def options(self, kind: ServerKind) -> dict[str, Any]:
        """What else a server of a kind is started with."""
        return {}

    def close(self) -> None:
        """End the server, if there is one."""
        self._target = None
        self._stack.close()

    def _oracle(self, dtype: str) -> Oracle:
        if dtype not in self._oracles:
            self._oracles[dtype] = Oracle(self.models, getattr(torch, dtype))
        return self._oracles[dtype]

    def _serve(
        self, kind: ServerKind, log: Path, environment: dict[str, str]
    ) -> AbstractContextManager[EngineServer]:
        options = self.options(kind)
        environment = {
            **environment,
            **_WIRE[kind.wire],
            "ENGINE_PLUGINS_STALL_TIMEOUT_S": str(STALL_TIMEOUT_S),
            "VLLM_SERVER_DEV_MODE": "1",  # its own routes are there, and must do no harm
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
            "PYTHONPATH": python_path(*((SGLANG_SHIMS,) if kind.engine == "sglang" else ())),
            **options.pop("environment", {}),
        }
        here = find_spec(kind.engine) is not None
        options = {"preload": here, **options}
        model, ranks, apis = self.models.folder(0), kind.tensor_parallel, kind.api_servers
        if kind.engine == "vllm":
            return vllm_server(
                model,
                log,
                tensor_parallel=ranks,
                api_servers=apis,
                arguments=["--enable-scale-out", "--dtype", kind.dtype],
                environment=environment,
                **options,
            )
        return sglang_server(
            model,
            log,
            tensor_parallel=ranks,
            api_servers=apis,
            arguments=["--engine-plugins-enable", "--dtype", kind.dtype],
            environment=environment,
            python=None if here else _SGLANG,
            **options,
        )
