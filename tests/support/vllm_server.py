"""A real `vllm serve` on loopback, in a process group of its own, with its output in a file."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from tests.support.engine_server import (
    EngineServer,
    StreamEvent,
    free_port,
    running,
    server_events,
)
from tests.support.preloaded import Nursery, of_the_allocator, preloaded

__all__ = ["VllmServer", "vllm_nursery", "vllm_server"]

EXTENSION = "vllm_ext.worker_extension.EnginePluginsWorkerExtension"
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # A folder of each server's own, as TMPDIR is, would have each compile anew what vLLM compiles.
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"),
}
IMPORTED = ("tests.support.vllm_beginning",)
"""What a server's processes import, see `preloaded`."""


def _loaded_at_start() -> dict[str, str]:
    """The OpenMP of torch, which vLLM on a CPU has each process load that it spawns.

    Where this names another file than vLLM does, such processes are started, not forked.
    """
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    folder = Path(torch.origin).parent
    found = [*folder.parent.glob("torch.libs/libgomp*.so*"), *folder.glob("lib/libgomp*.so*")]
    return {"LD_PRELOAD": str(found[0])} if found else {}


class VllmServer(EngineServer):
    """A running vLLM server, spoken to by its completions route."""

    kind = "vllm"

    def complete(self, prompt: Sequence[int], tokens: int = 16) -> httpx.Response:
        return self.http.post("/v1/completions", json=_completion(prompt, tokens))

    def tokens_of(self, response: httpx.Response) -> list[int]:
        return list(response.json()["choices"][0]["token_ids"])

    def oversized(self, *, stream: bool = False) -> httpx.Response:
        """Prompt logprobs, whose results are kept; a plain prompt is cut until it fits."""
        scored = {"prompt_logprobs": 0, "stream": stream}
        return self.http.post("/v1/completions", json={**_completion(range(1, 33), 1), **scored})

    def finish_reason(self, response: httpx.Response) -> str:
        return "error" if response.is_error else response.json()["choices"][0]["finish_reason"]

    def stream(self, prompt: Sequence[int], tokens: int) -> Iterator[StreamEvent]:
        body = {**_completion(prompt, tokens), "stream": True}
        for event in server_events(self.http, "/v1/completions", body):
            error = event.get("error")
            choice = {} if error else event["choices"][0]
            yield StreamEvent(
                token_ids=choice.get("token_ids") or [],
                finish_reason="error" if error else choice.get("finish_reason"),
                error=error["message"] if error else None,
            )


def _completion(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def vllm_server(
    model: Path,
    log: Path,
    *,
    tensor_parallel: int = 1,
    api_servers: int = 1,
    extension: str = EXTENSION,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
    tokenizer: Path | None = None,
    launcher: str = "vllm.entrypoints.cli.main",
    preload: bool = False,
) -> AbstractContextManager[VllmServer]:
    """A server for as long as a context lasts: as users start it, or preloaded.

    Without a folder of a tokenizer it takes token ids only.
    """
    port = free_port()
    program = Path(sys.executable).with_name("vllm")
    command = [
        *((sys.executable, "-m", launcher) if preload else (str(program),)),
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "64M", "--block-size", "32"),
        *(("--skip-tokenizer-init",) if tokenizer is None else ("--tokenizer", str(tokenizer))),
        *("--worker-extension-cls", extension),
        *("--tensor-parallel-size", str(tensor_parallel)),
        *("--api-server-count", str(api_servers)),
        *(() if api_key is None else ("--api-key", api_key)),
        *arguments,
    ]
    return running(
        VllmServer,
        command,
        port=port,
        log=log,
        api_servers=api_servers,
        environment={**QUIET, **(environment or {})},
        api_key=api_key,
        nursery=vllm_nursery(environment) if preload else None,
    )


def vllm_nursery(environment: Mapping[str, str] | None = None) -> Nursery:
    """Where processes begin with vLLM imported, see `preloaded`."""
    own = of_the_allocator(environment) | _loaded_at_start()
    return preloaded(*IMPORTED, OMP_NUM_THREADS="1", **QUIET, **own)
