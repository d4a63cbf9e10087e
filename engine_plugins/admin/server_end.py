"""The end of a server whose engine is dead: nothing of it may be left.

Engines see to that themselves, but not always: one that waits for answers which nobody will give
ends no more, and of several API processes the others may notice nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from engine_plugins.admin.engine_processes import has_ended
from engine_plugins.admin.runtime_dir import first_process
from engine_plugins.sleep.process_identity import ProcessIdentity

__all__ = ["ServerEnd", "end_with_first_process"]

logger = logging.getLogger(__name__)

LOOK_S = 1.0
PATIENCE_S = 3.0
"""For the engine to end its server, and for whoever waits for an answer to get it."""
TERM_S = 1.5
"""From SIGTERM to SIGKILL."""
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""End by themselves, and take shared memory with them that nobody has given back."""


def end_with_first_process(runtime_dir: Path) -> None:
    """Have this process end soon after the one that built the server, however that one ended.

    An engine's core and workers live on when their API process is killed, and hold its memory.
    """
    first = first_process()
    if first is not None and first.pid != os.getpid():
        name = "engine-plugins-first"
        threading.Thread(target=_follow, args=(first, runtime_dir), daemon=True, name=name).start()


def _follow(first: ProcessIdentity, runtime_dir: Path) -> None:
    while not has_ended(first.pid, first.start_ticks):
        time.sleep(LOOK_S)
    time.sleep(PATIENCE_S)  # most servers end all their processes themselves
    logger.critical("the process that built this server has ended (pid %d): so do all", first.pid)
    with suppress(psutil.Error):
        _kill(psutil.Process().children(recursive=True))
    shutil.rmtree(runtime_dir, ignore_errors=True)
    os._exit(1)


class ServerEnd:
    """Ends this process's server, once however often it is asked for.

    Args:
        runtime_dir: of the server; goes with it.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._begun = False

    def soon(self, why: str) -> None:
        """End the server in a few seconds, if it is still there then."""
        if self._begun:
            return
        self._begun = True
        logger.critical("%s; this server ends within a few seconds", why)
        # A thread: whatever the event loop waits for, and also once it has ended.
        threading.Thread(target=self._end, daemon=True, name="engine-plugins-end").start()

    def _end(self) -> None:
        time.sleep(PATIENCE_S)
        first = first_process()
        pid = os.getpid() if first is None else first.pid
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(TERM_S)
        if not self._is_ours_to_kill():
            time.sleep(TERM_S)  # the one that does it kills this process too
        logger.critical("the server has not ended by itself: its processes are killed")
        self._kill(pid)
        os._exit(1)

    def _is_ours_to_kill(self) -> bool:
        """Two API processes that killed each other would leave the first one."""
        try:
            (self._runtime_dir / "ending").mkdir()
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _kill(self, first: int) -> None:
        """Everything but this process, the first one last: it would start others anew."""
        me = os.getpid()
        with suppress(psutil.Error):
            root = psutil.Process(first)
            if first != me:
                root.suspend()
            _kill(each for each in root.children(recursive=True) if each.pid != me)
        shutil.rmtree(self._runtime_dir, ignore_errors=True)
        if first != me:
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            if not any(helper in part for part in process.cmdline() for helper in HELPERS):
                process.kill()
