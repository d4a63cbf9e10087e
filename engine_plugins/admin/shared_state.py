"""What all processes of one server know at once: a small shared page and a few files.

API processes, the engine's core and workers of this host map the same page, whose path the plugin
puts in the environment of the first process. So the state, a 409 and a 503 are answered without
asking the engine, however busy it is, and with any number of API processes. Sources, plans and
answers lie beside it as files that only this user can read.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from engine_plugins.admin.state import EngineState
from engine_plugins.errors import ConflictError
from engine_plugins.shared_page import SharedPage

__all__ = ["SharedState", "create_runtime_dir"]

PAGE_BYTES = 64 << 10


def create_runtime_dir(path: Path) -> None:
    """Lay out an empty runtime directory, readable by this user alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("sources", "plans", "used", "underway", "answers", "ranks", "sleep", "gate"):
        (path / name).mkdir(mode=0o700, exist_ok=True)
    page = path / "state.page"
    if not page.exists():
        SharedPage.create(page, nbytes=PAGE_BYTES)
        SharedState(path).change(
            lambda _: EngineState(since=time.time(), kv_life=secrets.token_hex(8))
        )


class SharedState:
    """One process's view of the server's state. Reading takes no lock and never blocks."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self._page = SharedPage(runtime_dir / "state.page")
        self._last: tuple[int, EngineState] | None = None

    def read(self) -> EngineState:
        """The state as it is now."""
        last = self._last
        if last is not None and last[0] == self._page.sequence:
            return last[1]
        sequence, payload = self._page.read()
        if sequence == 0:
            return EngineState(since=0.0)
        state = msgspec.msgpack.decode(payload, type=EngineState)
        self._last = (sequence, state)
        return state

    def change(self, change: Callable[[EngineState], EngineState]) -> EngineState:
        """Replace the state by what `change` makes of it, alone among all processes."""
        with self._writing():
            state = change(self.read())
            self._page.write(msgspec.msgpack.encode(state))
        return state

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Hold the one place for calls that move the engine from state to state.

        Raises:
            ConflictError: another such call is under way, in this process or another.
        """
        descriptor = os.open(self.runtime_dir / "operation.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._claim(descriptor, name)
            yield
        finally:
            os.close(descriptor)

    def _claim(self, descriptor: int, name: str) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            update = self.read().update
            doing = (
                "another call that changes the engine's state"
                if update is None
                else f"the update to version {update.version}"
            )
            raise ConflictError(
                f"cannot {name}: {doing} is under way",
                remedy="wait until GET /admin/v1/state shows that it has ended",
            ) from None

    def put(self, folder: str, name: str, body: bytes) -> None:
        """Keep a file for all processes; it appears whole or not at all."""
        target = self.runtime_dir / folder / name
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(body)
        temporary.replace(target)

    def get(self, folder: str, name: str) -> bytes | None:
        """A file kept by any process, or None. Names are ours, never a caller's."""
        try:
            return (self.runtime_dir / folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Names kept in a folder, oldest first."""
        found: list[tuple[int, str]] = []
        for entry in os.scandir(self.runtime_dir / folder):
            with suppress(FileNotFoundError):  # another process has just dropped it
                if not entry.name.endswith(".tmp"):
                    found.append((entry.stat().st_mtime_ns, entry.name))
        return [name for _, name in sorted(found)]

    def drop(self, folder: str, name: str) -> None:
        """Forget a file."""
        (self.runtime_dir / folder / name).unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone among writers; the kernel frees the lock when its holder dies."""
        descriptor = os.open(self.runtime_dir / "state.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
