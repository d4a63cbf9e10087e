"""Processes that begin with everything imported: forked from one that has done it once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["ForkedProcess"]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("fastapi", "uvicorn", "safetensors.torch", "engine_plugins.admin.app"),
        *(
            f"transformers.models.{kind}.modeling_{kind}"
            for kind in ("auto", "qwen2", "qwen3", "qwen3_moe")
        ),
    ]
)


class ForkedProcess:
    """A function in a process group of its own, with its output in a file; as `subprocess` has it.

    Args:
        target: what to run, a function at the top of a module.
        arguments: its arguments.
        log: where stdout and stderr go.
        environment: what is added to the environment of this moment before anything runs.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        *,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        log.touch()
        self._process = _FORKS.Process(
            target=_run,
            args=(target, arguments, log, {**os.environ, **environment}),
            daemon=True,
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it, stopped or not."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as there is one."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code


def _run(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    environment: dict[str, str],
) -> None:
    os.setpgid(0, 0)
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    target(*arguments)
