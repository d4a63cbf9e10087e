"""Programs of several processes, of which none outlives its test, and how they fork their ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from tests.support.rank_process import RankProcess

__all__ = ["fork_ranks", "output_of_ranks"]


def output_of_ranks(module: str, *arguments: str, **environment: str) -> str:
    """What a module prints that forks the ranks of a gloo group; it must end well."""
    program = RankProcess(module, *arguments, environment=environment)
    try:
        said = program.stdout.read()
        code = program.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.end()
    assert code == 0, f"{module} ended with {code}; its errors are above"
    return said


def fork_ranks(run_rank: Callable[..., None], world_size: int, *arguments: str) -> None:
    """Run `run_rank(rank, world_size, *arguments)` in a process each, and end as they end."""
    forks = multiprocessing.get_context("fork")
    ranks = [
        forks.Process(target=run_rank, args=(rank, world_size, *arguments), daemon=True)
        for rank in range(world_size)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    sys.exit(any(each.exitcode for each in ranks))
