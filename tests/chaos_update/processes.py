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

    They are told apart by who started them and when: names are not there where imports were made
    before, see `tests.support.preloaded`.

    Attributes:
        workers: of every rank.
        core: where it is scheduled; on SGLang that is the worker of rank 0.
        apis: those that answer HTTP.
        detokenizer: SGLang's.
    """

    def __init__(self, server: EngineServer, api_servers: int) -> None:
        self.workers: list[int] = []
        started: list[int] = []

        def told() -> bool:  # a busy engine may leave them out of one state, and of the next
            self.workers = [int(worker["pid"]) for worker in server.state()["workers"]]
            return bool(self.workers)

        until(told, otherwise=server.state)

        def all_started() -> bool:
            children = psutil.Process(server.pid).children()
            started[:] = [
                child.pid
                for child in sorted(children, key=psutil.Process.create_time)
                # What only tracks resources or forks has one thread.
                if child.num_threads() > 1 and child.pid not in self.workers
            ]
            return len(started) > (api_servers if api_servers > 1 else 0)

        until(all_started, otherwise=lambda: started)
        if server.kind == "vllm":
            self.core = beside = psutil.Process(self.workers[0]).ppid()
        else:
            self.core, beside = self.workers[0], started[0]
            self.detokenizer = beside  # it begins before the API processes
        self.apis = [pid for pid in started if pid != beside] or [server.pid]


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
