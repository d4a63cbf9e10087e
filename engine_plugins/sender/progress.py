"""The progress bar of an update: one line per engine, on the leading rank's terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from engine_plugins.errors import EnginePluginError
from engine_plugins.sender.access import EngineAccess

__all__ = ["progress_of"]

POLL_S = 0.2


def progress_of(
    urls: Sequence[str], version: int, *, access: EngineAccess, shown: bool | None
) -> AbstractContextManager[None]:
    """Draw a bar per engine while the block runs, fed by polling `GET /state`.

    Args:
        urls: base urls of the engines.
        version: the version on its way.
        access: how the engines are spoken to.
        shown: True draws, False does not, None draws when stderr is a terminal.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    return _drawn(urls, version, access) if shown else nullcontext()


@contextmanager
def _drawn(urls: Sequence[str], version: int, access: EngineAccess) -> Iterator[None]:
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}"),
        console=Console(stderr=True),
    )
    stop = threading.Event()
    with bars:
        watchers = [
            threading.Thread(
                target=_watch,
                args=(bars, bars.add_task(f"v{version} {url}", total=None, phase=""), url),
                kwargs={"access": access, "stop": stop},
                daemon=True,
            )
            for url in urls
        ]
        for watcher in watchers:
            watcher.start()
        try:
            yield
        finally:
            stop.set()
            for watcher in watchers:
                watcher.join(timeout=2.0)


def _watch(
    bars: Progress, task: TaskID, url: str, *, access: EngineAccess, stop: threading.Event
) -> None:
    with access.client(url, timeout_s=1.0) as client:
        while not stop.wait(POLL_S):
            try:
                now = client.state().update
            except EnginePluginError:
                continue  # the update itself will say what is wrong
            if now is not None:
                total = now.bytes_total or None
                bars.update(task, completed=now.bytes_done, total=total, phase=now.phase)
