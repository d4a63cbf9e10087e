"""A server's processes by what they do, and holding them still for a moment."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

import psutil

from tests.support.engine_server import EngineServer
from tests.support.waiting import until

__all__ = ["Processes", "held"]


class Processes:
    """The pids of a server that is well.

    Attributes:
        workers: of every rank.
        core: where vLLM schedules; SGLang's detokenizer, since its schedulers are the workers.
        apis: those that answer HTTP.
    """

    def __init__(self, server: EngineServer) -> None:
        until(lambda: bool(server.state()["workers"]), otherwise=server.state)
        self.workers = [int(worker["pid"]) for worker in server.state()["workers"]]
        children = psutil.Process(server.pid).children(recursive=True)
        if server.kind == "vllm":
            self.core = psutil.Process(self.workers[0]).ppid()
            apis = [each for each in children if _is_api_of_vllm(each, server.pid, self.core)]
        else:
            self.core = next(each.pid for each in children if "detokenizer" in each.name())
            apis = [each for each in children if "tokenizer_worker" in each.name()]
        self.apis = [each.pid for each in apis] or [server.pid]


def _is_api_of_vllm(process: psutil.Process, main: int, core: int) -> bool:
    """Its children are the core, API processes, and processes of one thread that track or fork."""
    return process.ppid() == main and process.pid != core and process.num_threads() > 1


@contextlib.contextmanager
def held(pids: Sequence[int]) -> Iterator[set[int]]:
    """Stop processes for as long as a context lasts, or longer if taken out of what it gives."""
    still = set(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield still
    finally:
        for pid in still:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
