"""Servers that tests share: one runs at a time, for all tests that name its configuration."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.engine_server import TOKEN, EngineServer
from tests.support.engines import Engine
from tests.support.live_models import LiveModel
from tests.support.offers import Offer, offered
from tests.support.sized_models import SizedModel
from tests.support.stepping import STEPPING_FOLDER, Steps

__all__ = ["TCP", "Configuration", "Served", "ServerPool"]

TCP = {"UCX_TLS": "tcp"}
"""The wire on which a stopped trainer really stalls a read."""
TELLING = 4
"""Tokens of an answer that tell a model from any other: the first of them does."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How a server is started; tests that name the same one share it.

    Attributes:
        name: for the tests' ids.
        model: what it is started with.
        tensor_parallel: ranks.
        api_servers: API processes.
        tcp: whether weights travel over tcp, whatever is faster.
        token_file: whether the admin tokens are in a file, and only there.
        keyed: whether the engine's own keys are set as well.
        watched: whether a test can hold and fail its installs.
        direct_landing: whether weights may land in live parameters.
        environment: further variables.
        real: whether real engines are started like this too, not the one in memory alone.
    """

    name: str
    model: LiveModel | SizedModel
    tensor_parallel: int = 1
    api_servers: int = 1
    tcp: bool = False
    token_file: bool = False
    keyed: bool = False
    watched: bool = False
    direct_landing: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    real: bool = True


class Served:
    """A running server, and what the tests that share it have in common."""

    def __init__(
        self, engine: Engine, configuration: Configuration, folder: Path, stack: ExitStack
    ) -> None:
        self.engine, self.configuration = engine, configuration
        self.steps = Steps(folder / "steps")
        self.steps.folder.mkdir()
        self.token_file = folder / "tokens"
        self.write_tokens("read", "control", "weights")
        self._stack = stack
        self._offers: dict[LiveModel, Offer] = {}
        self.server: EngineServer = stack.enter_context(
            engine.serve(
                configuration.model.copy_to(folder / "model"),
                folder / "server.log",
                tensor_parallel=configuration.tensor_parallel,
                api_servers=configuration.api_servers,
                environment=self._environment(),
                **(engine.keyed if configuration.keyed else {}),
                **(engine.watched if configuration.watched else {}),
            )
        )

    @property
    def lands_directly(self) -> bool:
        """Whether from the second update on all bytes land in live parameters."""
        return self.engine.feeds_peers and self.configuration.direct_landing

    def write_tokens(self, *scopes: str, more: str = "") -> None:
        """Replace the token file: the suite's token with some scopes, and further lines."""
        lines = [f"{scope} {TOKEN}\n" for scope in scopes]
        written = self.token_file.with_suffix(f".{secrets.token_hex(4)}")
        written.write_text("".join(lines) + more)
        written.replace(self.token_file)

    def offer(self, model: LiveModel) -> Offer:
        """A model's weights, registered in this process for as long as the server runs."""
        if model not in self._offers:
            offer = self._stack.enter_context(offered(self.server.admin, model.tensors()))
            self._offers[model] = offer
        return self._offers[model]

    def install(self, model: LiveModel, **options: Any) -> dict[str, Any]:
        """Update to a model, whatever serves now; the report."""
        done = self.offer(model).update(self.next_version(), **options)
        assert done.status_code == 200, done.text
        return dict(done.json())

    def update(self, plan_id: str, version: int | None = None, **more: Any) -> httpx.Response:
        """Ask for an update from a plan, by default to the next version."""
        body = {"plan_id": plan_id, "version": version or self.next_version(), **more}
        return self.server.admin.post("/weights/update", json=body)

    def restore(self, model: LiveModel) -> None:
        """Have a model's weights serve, whatever a test before left behind."""
        self.steps.clear()
        if not self._serves():
            self._bring_back()
        prompt, expected = model.prompts()[0], model.expected()[0][:TELLING]
        if not self._serves() or self.server.greedy(prompt, TELLING) != expected:
            self.install(model, resume=True)
            assert self.server.greedy(prompt, TELLING) == expected

    def _serves(self) -> bool:
        return bool(self.server.state()["state"] == "serving")

    def _bring_back(self) -> None:
        """Undo a prepared update, a sleep and a pause."""
        left = self.server.state()["update"]
        if left is not None:
            self.server.admin.post("/weights/abort", json={"request_id": left["request_id"]})
        self.server.admin.post("/wake")
        self.server.admin.post("/resume")

    def next_version(self) -> int:
        """A version that is newer than any that was tried."""
        history = self.server.admin.get("/weights").json()["history"]
        return 1 + max((report["version"] for report in history), default=0)

    def _environment(self) -> dict[str, str]:
        chosen = self.configuration
        tokens = {
            "ENGINE_PLUGINS_ADMIN_TOKEN": "",
            "ENGINE_PLUGINS_ADMIN_TOKEN_FILE": str(self.token_file),
        }
        return {
            **self.engine.environment,
            **(TCP if chosen.tcp else {}),
            "ENGINE_PLUGINS_DIRECT_LANDING": str(chosen.direct_landing),
            **(tokens if chosen.token_file else {}),
            **({STEPPING_FOLDER: str(self.steps.folder)} if chosen.watched else {}),
            **chosen.environment,
        }


class ServerPool:
    """Starts servers as tests ask for them; the one before is ended first.

    Args:
        new_folder: makes an empty folder.
    """

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._stack = ExitStack()
        self._served: Served | None = None

    def served(self, engine: Engine, configuration: Configuration) -> Served:
        """The server of a configuration, running."""
        now = self._served
        if now is None or (now.engine, now.configuration) != (engine, configuration):
            self.close()
            self._served = Served(engine, configuration, self._new_folder(), self._stack)
        assert self._served is not None
        return self._served

    def close(self) -> None:
        """End the server that runs, if any."""
        self._served = None
        self._stack.close()
