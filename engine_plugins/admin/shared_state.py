"""What all processes of one server know at once: one page of memory.

API processes, the engine's core and workers of this host map the same page, whose path the plugin
puts in the environment of the first process. So the state, a 409 and a 503 are answered without
asking the engine, however busy it is, and with any number of API processes. The update under way,
plans and answers lie in it too. It is opened once: a change needs no descriptor, no path and no
room on a disk.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

import msgspec

from engine_plugins.admin.sheet import COPIES, Sheet
from engine_plugins.admin.state import EngineState, carrier_stopped
from engine_plugins.byte_locks import ByteLocks
from engine_plugins.errors import ConflictError, OutdatedError, WriterStoppedError
from engine_plugins.shared_page import SharedPage

__all__ = ["Held", "SharedState", "UnderWay", "create_runtime_dir"]

SheetName = Literal["state", "operation", "record", "plans", "answers", "leaks"]
_SHEETS: dict[SheetName, int] = {
    "state": 128 << 10,
    "operation": 4 << 10,
    "record": 128 << 10,
    "plans": 512 << 10,
    "answers": 1 << 20,
    "leaks": 64 << 10,
}
"""What lies in the page, with twice the bytes that each may have."""
PAGE_BYTES = COPIES * sum(_SHEETS.values())

_OPERATION, _WRITING = 0, 1 << 32
"""Where the bytes lie that are locked: one of each kind for every generation."""
CLAIM_S = 0.01
WRITE_WAIT_S = 1.0
"""A write takes microseconds: who holds the page for longer does not run."""


def create_runtime_dir(path: Path) -> None:
    """Lay out an empty runtime directory, readable by this user alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("sources", "ranks", "gate"):
        (path / name).mkdir(mode=0o700, exist_ok=True)
    page = path / "state.page"
    if not page.exists():
        SharedPage.create(page, nbytes=PAGE_BYTES)
        SharedState(path).change(
            lambda _: EngineState(since=time.time(), kv_life=secrets.token_hex(8))
        )


class UnderWay(msgspec.Struct, frozen=True, kw_only=True):
    """The call that holds the one place for calls that move the engine."""

    name: str
    pid: int
    since: float
    """On the host's monotonic clock."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The hold of an operation on the place."""

    generation: int
    waited_s: float
    """How long another call kept it."""


_carried: ContextVar[tuple[Path, int] | None] = ContextVar("carried_generation", default=None)
"""The generation of the operation that this task, or the one that started it, is part of."""


class SharedState:
    """One process's view of the server's state. Reading takes no lock and never blocks."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        path = runtime_dir / "state.page"
        pages = SharedPage.parts(path, [size for size in _SHEETS.values() for _ in range(COPIES)])
        self._gauges = pages[0].gauges
        """First the newest generation, then since when it is that, in microseconds."""
        self._sheets = {
            name: Sheet(pages[COPIES * place : COPIES * (place + 1)])
            for place, name in enumerate(_SHEETS)
        }
        self._locks = ByteLocks(path)
        self._last: tuple[int, int, EngineState] | None = None

    @property
    def generation(self) -> int:
        """Whose word counts: that of the operation that the caller is part of, else the newest.

        It is one more after each `take_over`. Calls to the engine carry it, so that what a stopped
        process sends when it wakes up can be told from what its successor sends.
        """
        carried = _carried.get()
        if carried is not None and carried[0] == self.runtime_dir:
            return carried[1]
        return self._gauges[0]

    def require_newest(self) -> None:
        """Go on only if nobody has taken the place of the caller's operation.

        Raises:
            OutdatedError: somebody has.
        """
        _refuse_outdated(self.generation, self._gauges[0])

    def read(self) -> EngineState:
        """The state as it is now; a fence, where a stopped process left another."""
        generation, last = self._gauges[0], self._last
        sheet = self._sheets["state"]
        sequence = sheet.sequence(generation)
        if last is not None and last[:2] == (generation, sequence):
            return last[2]
        wrote, payload = sheet.read(generation)
        if not payload:
            return EngineState(since=0.0)
        state = msgspec.msgpack.decode(payload, type=EngineState)
        if wrote < generation:
            state = carrier_stopped(state, since=self._gauges[1] / 1e6)
        self._last = (generation, sequence, state)
        return state

    def change(self, change: Callable[[EngineState], EngineState]) -> EngineState:
        """Replace the state by what `change` makes of it, alone among all processes.

        Raises:
            OutdatedError: another process has taken the place of the caller's operation.
            WriterStoppedError: a process stopped while it wrote.
        """
        with self._writing() as generation:
            state = change(self.read())
            self._write("state", generation, msgspec.msgpack.encode(state))
        return state

    def kept(self, name: SheetName) -> bytes:
        """What was kept under a name, by any process; nothing at first."""
        return self._sheets[name].read(self._gauges[0])[1]

    def revise(self, name: SheetName, change: Callable[[bytes], bytes]) -> None:
        """Replace what is kept under a name, as `change` does for the state."""
        with self._writing() as generation:
            self._write(name, generation, change(self.kept(name)))

    def take_over(
        self, change: Callable[[EngineState], EngineState], *, of: int | None = None
    ) -> EngineState:
        """Take the place of a process that does not answer, whatever locks it holds.

        At once the state counts as fenced, in every process; what the other one writes when it
        wakes up counts for nothing. Then the state is replaced as by `change`, and the place for
        an operation is free. Nothing happens where another process was quicker.

        Args:
            change: makes the new state, of the old one behind a fence.
            of: the generation that does not answer; the newest, if it is not given.
        """
        newest = self._gauges[0]
        old = newest if of is None else of
        first = newest == old
        if first:
            self._gauges[1] = int(time.time() * 1e6)
            self._gauges[0] = old + 1
        token = _carried.set((self.runtime_dir, old + 1))
        try:
            with self._writing() as generation:
                if first or self._sheets["state"].read(generation)[0] < generation:
                    state = change(self.read())
                    self._write("state", generation, msgspec.msgpack.encode(state))
        except OutdatedError:
            pass  # the next one has been taken over meanwhile, and that is the state now
        finally:
            _carried.reset(token)
        return self.read()

    @asynccontextmanager
    async def operation(
        self,
        name: str,
        *,
        wait_s: float = 0.0,
        unless: Callable[[EngineState], None] | None = None,
    ) -> AsyncIterator[Held]:
        """Hold the one place for calls that move the engine from state to state.

        Args:
            name: of the call, for whoever finds the place taken.
            wait_s: how long to wait for another call to end.
            unless: raises where waiting is of no use in this state.

        Raises:
            ConflictError: another such call is under way, in this process or another.
        """
        began = time.monotonic()
        while (generation := self._claim()) is None:
            if unless is not None:
                unless(self.read())
            if time.monotonic() - began >= wait_s:
                raise self.occupied(name, wait_s)
            await asyncio.sleep(CLAIM_S)
        token = _carried.set((self.runtime_dir, generation))
        try:
            now = time.monotonic()
            note = UnderWay(name=name, pid=os.getpid(), since=now)
            self._write("operation", generation, msgspec.msgpack.encode(note))
            yield Held(generation=generation, waited_s=now - began)
        finally:
            _carried.reset(token)
            self._locks.give(_OPERATION + generation)

    def under_way(self) -> UnderWay | None:
        """The call that holds the place now, in whatever process; None where it is free."""
        generation = self._gauges[0]
        if not self._locks.is_taken(_OPERATION + generation):
            return None
        wrote, note = self._sheets["operation"].read(generation)
        if not note or wrote < generation:
            return UnderWay(name="that has just begun", pid=0, since=time.monotonic())
        return msgspec.msgpack.decode(note, type=UnderWay)

    def _claim(self) -> int | None:
        """Take the place in the newest generation, and say which that is."""
        generation = self._gauges[0]
        if not self._locks.take(_OPERATION + generation):
            return None
        if self._gauges[0] == generation:
            return generation
        self._locks.give(_OPERATION + generation)
        return None

    def occupied(self, name: str, waited_s: float = 0.0) -> ConflictError:
        """The error of a call that finds the place taken; it names the call that has it."""
        update, call = self.read().update, self.under_way()
        if call is None:
            doing = "another call, which ended just now,"
        elif update is None:
            doing = f"{call.name} ({_told(call)})"
        else:
            doing = f"the update to version {update.version} ({update.phase}; {_told(call)})"
        waited = f", also after a wait of {waited_s:g} s" if waited_s else ""
        return ConflictError(
            f"cannot {name}: {doing} is under way{waited}",
            remedy="wait until GET /admin/v1/state shows that it has ended",
        )

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """Alone among the writers of a generation; the kernel frees the lock of a dead one."""
        generation = self.generation
        place = _WRITING + generation
        give_up = time.monotonic() + WRITE_WAIT_S
        while not self._locks.take(place):
            self.require_newest()
            if time.monotonic() > give_up:
                raise WriterStoppedError(
                    f"a process of this server has been writing the state for {WRITE_WAIT_S:g} s: "
                    "it is stopped",
                    remedy="let it go on, or kill it",
                )
            time.sleep(0.0005)
        try:
            self.require_newest()
            yield generation
        finally:
            self._locks.give(place)

    def _write(self, name: SheetName, generation: int, body: bytes) -> None:
        def still_newest() -> None:
            _refuse_outdated(generation, self._gauges[0])

        self._sheets[name].write(generation, body, still_newest)


def _refuse_outdated(generation: int, newest: int) -> None:
    if generation != newest:
        raise OutdatedError(
            "another process has taken the place of this call, which had not answered for too "
            f"long (generation {generation}, now {newest}): nothing of it counts any more",
            remedy="GET /admin/v1/state says what the engine holds now",
        )


def _told(call: UnderWay) -> str:
    return f"process {call.pid}, for {time.monotonic() - call.since:.1f} s"
