"""What every real engine server of the tests has: a process group, an URL, and greedy tokens."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import httpx
import msgspec

from engine_plugins.sleep.process_identity import ProcessIdentity, presence
from tests.support.documented import check_answer
from tests.support.preloaded import Nursery, PreloadedProcess

__all__ = [
    "ROOT",
    "TOKEN",
    "EngineServer",
    "ServerProcess",
    "StreamEvent",
    "answering",
    "dead_servers",
    "free_port",
    "running",
    "server_environment",
    "server_events",
]

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-tests"
START_S = 240.0
STARTED = "Application startup complete."
"""What each API server of either engine says, by uvicorn, when it begins to take requests."""


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One event of a streamed completion: what it adds."""

    token_ids: list[int]
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class EngineServer(abc.ABC):
    """A running server; requests are token ids in and token ids out."""

    kind: ClassVar[str]

    url: str
    pid: int
    log: Path
    http: httpx.Client
    admin: httpx.Client

    @abc.abstractmethod
    def complete(self, prompt: Sequence[int], tokens: int = 16) -> httpx.Response:
        """The raw answer to a greedy completion that does not end early."""

    @abc.abstractmethod
    def tokens_of(self, response: httpx.Response) -> list[int]:
        """The generated ids in such an answer."""

    @abc.abstractmethod
    def oversized(self, *, stream: bool = False) -> httpx.Response:
        """The answer to a request that fits nowhere where the prefill gate has no room."""

    @abc.abstractmethod
    def finish_reason(self, response: httpx.Response) -> str:
        """Why such an answer ended; an answer that is an HTTP error ended by `error`."""

    @abc.abstractmethod
    def stream(self, prompt: Sequence[int], tokens: int) -> Iterator[StreamEvent]:
        """The events of a streamed greedy completion, as they come."""

    def greedy(self, prompt: Sequence[int], tokens: int = 16) -> list[int]:
        """Greedy token ids for a prompt; raises on an HTTP error."""
        response = self.complete(prompt, tokens)
        response.raise_for_status()
        return self.tokens_of(response)

    def state(self) -> dict[str, Any]:
        """The admin state."""
        response = self.admin.get("/state")
        response.raise_for_status()
        return dict(response.json())

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class ServerProcess(Protocol):
    """The first process of a server, in a process group of its own; as `subprocess` has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Server = TypeVar("Server", bound=EngineServer)


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_events(http: httpx.Client, path: str, body: object) -> Iterator[dict[str, Any]]:
    """The data of the server-sent events that answer a POST, as they come."""
    with http.stream("POST", path, json=body) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[len("data: ") :])


@contextlib.contextmanager
def running(
    kind: type[Server],
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    api_servers: int = 0,
    environment: Mapping[str, str],
    api_key: str | None,
    nursery: Nursery | None = None,
) -> Iterator[Server]:
    """Start a server on a port of loopback, wait until it answers, end its processes afterwards.

    It answers when `/health` does and that many API servers have said that they started. Its
    processes are a group, but no session of their own: with one, API servers stood still for
    seconds (docs/decisions.md, D15).
    """
    process = _started(
        command, log, {**os.environ, **server_environment(log, environment)}, nursery
    )
    with answering(
        kind, process, port=port, log=log, api_servers=api_servers, api_key=api_key
    ) as server:
        yield server


def _started(
    command: Sequence[str], log: Path, environment: Mapping[str, str], nursery: Nursery | None
) -> ServerProcess:
    with log.open("w") as output:
        if nursery is not None:
            with open(os.devnull) as nothing:
                files = (nothing.fileno(), output.fileno(), output.fileno())
                return PreloadedProcess(nursery, command[1:], environment=environment, files=files)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


@contextlib.contextmanager
def answering(
    kind: type[Server],
    process: ServerProcess,
    *,
    port: int,
    log: Path,
    api_servers: int,
    api_key: str | None,
) -> Iterator[Server]:
    """A server whose process has been started: wait until it answers, end it afterwards."""
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process, log, api_servers)
        with _client(url, api_key) as http, _client(url + "/admin/v1", TOKEN) as admin:
            yield kind(url=url, pid=process.pid, log=log, http=http, admin=admin)
    finally:
        ended = _end_group(process)
    if ended:
        left = dead_servers(log.parent)
        assert not left, f"a server that was asked to end has left {left}"


def dead_servers(folder: Path) -> list[Path]:
    """Runtime directories in a folder whose owners have ended."""
    found = []
    for note in folder.glob("engine-plugins-*/owner"):
        owner = msgspec.json.decode(note.read_bytes(), type=ProcessIdentity)
        if presence(owner) in ("gone", "reused"):
            found.append(note.parent)
    return found


def _client(url: str, token: str | None) -> httpx.Client:
    """A connection of its own for every request: any API server may answer any of them."""
    return httpx.Client(
        base_url=url,
        timeout=120,
        limits=httpx.Limits(max_keepalive_connections=0),
        headers={} if token is None else {"Authorization": f"Bearer {token}"},
        event_hooks={"response": [] if token != TOKEN else [check_answer]},
    )


def server_environment(log: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """What a server is told beside the environment of the tests."""
    return {
        "TMPDIR": str(log.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "",  # what the tests' own is does not count: a server finds its network
        "ENGINE_PLUGINS_ADMIN_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def _wait_ready(url: str, process: ServerProcess, log: Path, api_servers: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        # The API servers share one port: an answer shows that one of them is there.
        if log.read_text(errors="replace").count(STARTED) >= api_servers:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health", timeout=5).status_code == 200:
                    return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the server did not come up (exit code {process.poll()}):\n{tail}")


def _end_group(process: ServerProcess) -> bool:
    """SIGTERM to the group, then SIGKILL to what is left of it; whether the first was enough."""
    asked = process.poll() is None
    for number, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        asked = asked and (number != signal.SIGTERM or process.poll() is not None)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return asked
