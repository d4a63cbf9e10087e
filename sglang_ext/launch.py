"""Where SGLang starts an engine's schedulers: the process that does so owns the runtime directory.

It need not be the first of a program: frameworks run `launch_server` in processes of their own,
several of them from one launcher.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from engine_plugins.admin.engine_processes import sign_in
from engine_plugins.admin.runtime_dir import ensure_runtime_dir, remove_runtime_dir
from engine_plugins.settings import PREFIX
from sglang_ext.server_flags import check_launch

__all__ = ["ROLE", "before_kill", "launch_detokenizers", "launch_schedulers"]

ROLE = PREFIX + "RUNTIME_ROLE"
"""In the environment of a scheduler, and of nothing that is started otherwise."""


def launch_schedulers(
    original: Callable[..., Any], engine: type, server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `Engine._launch_scheduler_processes`."""
    ensure_runtime_dir()
    check_launch(server_args)
    os.environ[ROLE] = "scheduler"
    try:
        return original(engine, server_args, *args, **kwargs)
    finally:
        os.environ.pop(ROLE, None)


def launch_detokenizers(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around `Engine._launch_detokenizer_subprocesses`: no answer goes out without them.

    They run none of our code, so whoever starts them signs them in. With several API processes
    SGLang does not notice that one has died.
    """
    processes, names = original(*args, **kwargs)
    folder = ensure_runtime_dir()
    for process, name in zip(processes, names, strict=True):
        _, _, number = name.partition("_")
        if number == "router":
            sign_in(folder, "detokenizer router", pid=process.pid)
        else:
            sign_in(folder, "detokenizer", int(number) if number else None, pid=process.pid)
    return processes, names


def before_kill(
    parent_pid: int | None, include_parent: bool = True, *args: Any, **kwargs: Any
) -> None:
    """Before `kill_process_tree`: with SIGKILL to itself SGLang's first process ends for good."""
    if include_parent and parent_pid == os.getpid():
        remove_runtime_dir()
