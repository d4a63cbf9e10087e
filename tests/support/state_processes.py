"""Real processes that share a server's state with the test, to be stopped and killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine_plugins.admin.shared_state import SharedState

__all__ = ["enter", "program", "started"]

ROOT = Path(__file__).parents[2]


def program(body: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process of the server; it has `shared`, and nothing of torch or the engine."""
    head = """
        import asyncio, os, sys, time
        import msgspec
        from pathlib import Path
        from engine_plugins.admin.shared_state import SharedState
        from engine_plugins.admin.state import Pause, moved
        shared = SharedState(Path(sys.argv[1]))
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def started(body: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line."""
    process = program(body, *arguments)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


async def enter(shared: SharedState, name: str, **how: Any) -> float:
    """Hold the place for a moment; how long it was waited for."""
    async with shared.operation(name, **how) as held:
        return held.waited_s
