"""Whether an update is staged: what its ranks would hold, beside the memory that is surely free.

Staged, nothing that goes wrong in a pull costs anything; but the receive buffers of all ranks of
the host are as large as what these ranks receive, and a kernel that runs out of memory ends
engines. So one place decides, for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from engine_plugins.errors import UnsupportedError

__all__ = ["Mode", "ModeChoice", "StagingRoom", "choose_mode", "newly_taken"]

Mode = Literal["auto", "staged", "in_place"]

SHARE = 4
"""`auto` takes at most one of so many parts of what is free: the loader takes memory too, requests
do, and other engines of the host choose at the same time."""


class StagingRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What staging would take on one rank, in bytes of host memory."""

    tp_rank: int
    wanted_bytes: int
    """Of the receive buffer."""
    held_bytes: int
    """Of it, what an earlier update left resident, which is used again or freed."""
    free_bytes: int
    """Surely free beside that, to all ranks of the host together."""
    quarantined_bytes: int = 0
    """Lost to earlier pulls, until nothing can come into it any more."""


class ModeChoice(NamedTuple):
    """How an update goes, and why."""

    staged: bool
    reason: str


def newly_taken(rooms: Sequence[StagingRoom]) -> int:
    """Bytes that staging would take beyond what the ranks hold."""
    return sum(max(room.wanted_bytes - room.held_bytes, 0) for room in rooms)


def choose_mode(
    mode: Mode, rooms: Sequence[StagingRoom], bound_bytes: int | None, others_bytes: int = 0
) -> ModeChoice:
    """The same for all ranks of an update.

    Args:
        mode: what was asked.
        rooms: of every rank of the host; none need be asked for `in_place`.
        bound_bytes: what `auto` may take, if that is not a share of what is free.
        others_bytes: what other servers of the host are about to take, which still shows as free.

    Raises:
        UnsupportedError: `staged` was asked and the ranks together do not fit, or as much as they
            would take is lost already.
    """
    if mode == "in_place":
        return ModeChoice(False, "as asked")
    wanted = sum(room.wanted_bytes for room in rooms)
    lost = sum(room.quarantined_bytes for room in rooms)
    if wanted and lost >= wanted:
        # Each staged pull that breaks may lose as much again.
        said = f"{_size(lost)} are lost to earlier pulls whose bytes may still come in"
        if mode == "staged":
            raise UnsupportedError(
                f"{said}, and staging takes {_size(wanted)} more; nothing was fetched",
                remedy="update in place; end the processes that these pulls read from or that "
                "wrote, or restart the engine, to have the memory back",
            )
        return ModeChoice(False, said)
    free = min(room.free_bytes for room in rooms) + sum(room.held_bytes for room in rooms)
    if mode == "staged":
        if wanted > free:
            raise UnsupportedError(
                f"staging needs {_size(wanted)} of host memory on {len(rooms)} ranks together, "
                f"and {_size(free)} are free; nothing was fetched",
                remedy="update with mode auto or in_place",
            )
        return ModeChoice(True, "as asked")
    if not wanted:
        return ModeChoice(False, "nothing is received that could wait")
    limit, what = _limit(free, bound_bytes, others_bytes)
    if wanted <= limit:
        return ModeChoice(True, f"{_size(wanted)} of {_size(free)} free on the host")
    return ModeChoice(False, f"staging wants {_size(wanted)}, {what} is {_size(limit)}")


def _limit(free: int, bound: int | None, others: int) -> tuple[int, str]:
    """What the ranks together may take, and what that is."""
    less = f" less {_size(others)} of other servers" if others else ""
    if bound is None:
        share = max(free // SHARE - others, 0)
        return share, f"a quarter of what is free on the host{less}"
    left = max(free - others, 0)
    if bound <= left:
        return bound, "ENGINE_PLUGINS_STAGING_BYTES"
    return left, f"what is free on the host{less}"


def _size(nbytes: int) -> str:
    """As people read it."""
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"
