"""A real SGLang server on loopback, in a process group of its own, with its output in a file.

It runs in this process's own environment, or in that of a Python that is named. What of it is not
real is in `sglang_shims`: the import of its kernel package, and torchvision's operators.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from tests.support.engine_server import (
    ROOT,
    EngineServer,
    StreamEvent,
    free_port,
    running,
    server_events,
)
from tests.support.preloaded import of_the_allocator, preloaded

__all__ = ["SGLANG_SHIMS", "SglangServer", "sglang_server"]

SGLANG_SHIMS = ROOT / "tests" / "support" / "sglang_shims"
ON_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # or its experts' routing needs a C++ compiler
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",  # with these its end would wait for seconds
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120",  # an import on a busy core
    "PYTHONPATH": os.pathsep.join([str(SGLANG_SHIMS), str(ROOT)]),
}
IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
)
"""What a server's processes import, see `preloaded`."""


class SglangServer(EngineServer):
    """A running SGLang server, spoken to by its own generate route."""

    kind = "sglang"

    def complete(self, prompt: Sequence[int], tokens: int = 16) -> httpx.Response:
        return self.http.post("/generate", json=_generation(prompt, tokens))

    def tokens_of(self, response: httpx.Response) -> list[int]:
        return list(response.json()["output_ids"])

    def oversized(self, *, stream: bool = False) -> httpx.Response:
        """Logprobs of the prompt, whose results are kept; a plain prompt is cut until it fits."""
        scored = {"return_logprob": True, "logprob_start_len": 0, "stream": stream}
        return self.http.post("/generate", json={**_generation(range(1, 33), 1), **scored})

    def finish_reason(self, response: httpx.Response) -> str:
        return "error" if response.is_error else _finish_reason(response.json())["type"]

    def stream(self, prompt: Sequence[int], tokens: int) -> Iterator[StreamEvent]:
        """SGLang repeats with every event all ids so far: only new ones are told."""
        body = {**_generation(prompt, tokens), "stream": True}
        told = 0
        for event in server_events(self.http, "/generate", body):
            ids = event.get("output_ids", [])
            yield _stream_event(event, ids[told:])
            told = max(told, len(ids))


def _stream_event(event: dict[str, Any], new_ids: list[int]) -> StreamEvent:
    """An error after the stream has begun: an event of its own, or an abort with a status."""
    reason = {} if "error" in event else _finish_reason(event)
    error = event.get("error") or (reason if reason.get("status_code") else None)
    return StreamEvent(
        token_ids=new_ids,
        finish_reason="error" if error else reason.get("type"),
        error=error["message"] if error else None,
    )


def _finish_reason(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["meta_info"]["finish_reason"] or {}


def _generation(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}


def sglang_server(
    model: Path,
    log: Path,
    *,
    tensor_parallel: int = 1,
    api_servers: int = 1,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    launcher: str = "sglang.launch_server",
    python: Path | None = None,
    tokenizer: Path | None = None,
    preload: bool = False,
) -> AbstractContextManager[SglangServer]:
    """A server for as long as a context lasts: as users start it, or preloaded.

    SGLang takes no key with several API servers. Without a folder of a tokenizer it takes token
    ids only.
    """
    port = free_port()
    command = [
        *(str(python or sys.executable), "-m", launcher, "--model-path", str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
        *("--max-total-tokens", "2048", "--max-running-requests", "8"),
        *("--skip-server-warmup", "--sleep-on-idle"),
        *(
            ("--skip-tokenizer-init",)
            if tokenizer is None
            else ("--tokenizer-path", str(tokenizer))
        ),
        *("--tensor-parallel-size", str(tensor_parallel)),
        *("--tokenizer-worker-num", str(api_servers)),
        *(() if api_key is None else ("--api-key", api_key)),
        *(() if admin_api_key is None else ("--admin-api-key", admin_api_key)),
        *arguments,
    ]
    return running(
        SglangServer,
        command,
        port=port,
        log=log,
        api_servers=api_servers,
        environment={
            **ON_CPU,
            "SGLANG_CPU_OMP_THREADS_BIND": _cores(tensor_parallel),
            **(environment or {}),
        },
        api_key=api_key,
        nursery=preloaded(*IMPORTED, OMP_NUM_THREADS="1", **ON_CPU, **of_the_allocator(environment))
        if preload
        else None,
    )


def _cores(ranks: int) -> str:
    """A core for each rank; by default SGLang wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
