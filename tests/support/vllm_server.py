"""A real `vllm serve` on loopback, in a process group of its own, with its output in a file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-tests"
EXTENSION = "vllm_ext.worker_extension.EnginePluginsWorkerExtension"
START_S = 240.0


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """A running server; requests are token ids in and token ids out."""

    url: str
    pid: int
    log: Path
    http: httpx.Client
    admin: httpx.Client

    def greedy(self, prompt: Sequence[int], tokens: int = 16) -> list[int]:
        """Greedy token ids for a prompt."""
        response = self.complete(prompt, tokens)
        response.raise_for_status()
        return list(response.json()["choices"][0]["token_ids"])

    def complete(self, prompt: Sequence[int], tokens: int = 16) -> httpx.Response:
        """The raw answer to a greedy completion."""
        return self.http.post("/v1/completions", json=_completion(prompt, tokens))

    def stream(self, prompt: Sequence[int], tokens: int) -> Iterator[dict[str, Any]]:
        """The events of a streamed greedy completion, as they come."""
        body = {**_completion(prompt, tokens), "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[len("data: ") :])

    def state(self) -> dict[str, Any]:
        """The admin state."""
        response = self.admin.get("/state")
        response.raise_for_status()
        return dict(response.json())

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _completion(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@contextlib.contextmanager
def vllm_server(
    model: Path,
    log: Path,
    *,
    tensor_parallel: int = 1,
    api_servers: int = 1,
    extension: str = EXTENSION,
    environment: dict[str, str] | None = None,
    api_key: str | None = None,
) -> Iterator[VllmServer]:
    """Start a server and wait until it answers; end its whole process group afterwards.

    A group but no session of its own: with one, API servers stood still for seconds
    (docs/decisions.md, D15).
    """
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "64M", "--block-size", "32"),
        *("--skip-tokenizer-init", "--worker-extension-cls", extension),
        *("--tensor-parallel-size", str(tensor_parallel)),
        *("--api-server-count", str(api_servers)),
        *(() if api_key is None else ("--api-key", api_key)),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment({"TMPDIR": str(log.parent), **(environment or {})}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process, log)
        limits = httpx.Limits(max_keepalive_connections=0)
        with (
            httpx.Client(
                base_url=url,
                timeout=120,
                limits=limits,
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            ) as http,
            httpx.Client(
                base_url=url + "/admin/v1",
                timeout=120,
                limits=limits,
                headers={"Authorization": f"Bearer {TOKEN}"},
            ) as admin,
        ):
            yield VllmServer(url=url, pid=process.pid, log=log, http=http, admin=admin)
    finally:
        _end_group(process)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "lo",
        "ENGINE_PLUGINS_ADMIN_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"vllm serve did not come up (exit code {process.poll()}):\n{tail}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, then SIGKILL to what is left of it."""
    for number, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
