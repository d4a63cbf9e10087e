"""Programs of several processes, of which none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal

from tests.support.rank_process import RankProcess

__all__ = ["output_of_ranks"]


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
