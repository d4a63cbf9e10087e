"""How the trainer's ranks find each other: through the store that torch.distributed met by.

The group that they form is their own, so that nothing waits behind the trainer's collectives, and
a rank that never comes can be named: `torch.distributed.new_group` says only that it timed out.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    ProcessGroupGloo,
    Store,
    _get_default_store,
)

from engine_plugins.errors import SettingsError, UpdateFailedError

__all__ = ["Meeting", "meet", "members_of", "missing_ranks"]

LONGEST_PAUSE_S = 0.05
LOOK_S = 1.0
"""How long a rank waits for the leading one before signals are handled again."""
GRACE_S = 2.0
"""How much longer the other ranks wait than the leading one, who can say which are missing."""
FORMED_S = 60.0
"""For ranks that are all there to connect to each other."""


class Meeting:
    """A group of ranks, and the part of the store that is theirs.

    Attributes:
        group: gloo, over all members in their order.
        store: what a rank leaves for the others beside the group.
    """

    def __init__(self, group: Any, store: Store) -> None:
        self.group, self.store = group, store  # torch's stubs know none of gloo's calls


def members_of(process_group: dist.ProcessGroup | None) -> list[int]:
    """Global ranks of a group, by default of all processes; [0] without torch.distributed.

    Raises:
        SettingsError: this process is not of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    members: list[int] = []
    with suppress(ValueError, RuntimeError, KeyError, AttributeError):
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    if dist.get_rank() not in members:
        raise SettingsError(
            f"trainer rank {dist.get_rank()} is not of the process_group that was given "
            f"({process_group!r})",
            remedy="make the sender on the ranks of the group alone",
        )
    return members


def meet(members: Sequence[int], me: int, *, wait_s: float) -> Meeting:
    """Wait for all members, and form a group.

    Args:
        members: global ranks, the leading one first; the same on each.
        me: this process's.
        wait_s: how long the others may take.

    Raises:
        UpdateFailedError: somebody did not come; the leading rank names who, and all raise it.
    """
    whose = hashlib.sha256(repr(list(members)).encode()).hexdigest()[:16]
    store = PrefixStore(f"engine_plugins/{whose}", _get_default_store())
    mine, ticket = _here(me), secrets.token_hex(8)
    store.delete_key(_left(me))
    store.set(mine, ticket)
    try:
        if me == members[0]:
            place = _call(store, members, me, wait_s)
        else:
            place = _wait_for_call(store, members, me, ticket, wait_s + GRACE_S)
    except BaseException:  # an interrupt too: nobody may take us for one who waits
        with suppress(RuntimeError):
            store.set(_left(me), "")
            store.delete_key(mine)
        raise
    ours = PrefixStore(place, store)
    try:
        group = ProcessGroupGloo(ours, members.index(me), len(members), timedelta(seconds=FORMED_S))
    except RuntimeError as error:
        raise UpdateFailedError(
            f"trainer rank {me} of {len(members)} could not connect to the others: {error}",
            remedy="look for a rank that ended; if none did, have GLOO_SOCKET_IFNAME name the "
            "interface over which the ranks reach each other",
        ) from error
    return Meeting(group, ours)


def missing_ranks(
    missing: Sequence[int], count: int, *, me: int, wait_s: float, what: str
) -> UpdateFailedError:
    """The error of ranks that were waited for in vain.

    Args:
        missing: global ranks; empty if they could not be told.
        count: ranks of the whole.
        me: this process's global rank.
        wait_s: how long was waited.
        what: what they did not do, after their numbers.
    """
    shown = ", ".join(str(rank) for rank in missing[:16]) or "unknown"
    more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
    plural = "s" if len(missing) != 1 else ""
    return UpdateFailedError(
        f"trainer rank{plural} {shown}{more} of {count} {what} within {wait_s:g} s",
        remedy="make the sender and call update on every rank (meet_timeout_s is how long they "
        f"wait for each other at first); to send from rank {me} alone, give it "
        f"process_group=torch.distributed.new_group([{me}], use_local_synchronization=True)",
    )


def _call(store: Store, members: Sequence[int], me: int, wait_s: float) -> str:
    """The leading rank's part: wait until all are here, then tell each where they meet."""
    until, pause_s = time.monotonic() + wait_s, 0.001
    keys = [_here(rank) for rank in members]
    while not store.check(keys):
        if time.monotonic() >= until:
            error = _not_all(store, members, me, wait_s)
            _tell(store, [key for key in keys if store.check([key])], f"!{error.message}")
            raise error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    place = secrets.token_hex(8)
    _tell(store, keys, f"={place}")
    return place


def _tell(store: Store, keys: list[str], what: str) -> None:
    for key, ticket in zip(keys, store.multi_get(keys), strict=True):
        store.delete_key(key)
        store.set(_called(ticket.decode()), what)


def _wait_for_call(
    store: Store, members: Sequence[int], me: int, ticket: str, wait_s: float
) -> str:
    """Where the leading rank has all meet."""
    until, key = time.monotonic() + wait_s, _called(ticket)
    while not store.check([key]):
        if time.monotonic() >= until:
            raise _not_all(store, members, me, wait_s - GRACE_S)
        try:
            store.wait([key], timedelta(seconds=min(LOOK_S, wait_s)))
        except dist.DistNetworkError as lost:
            raise UpdateFailedError(
                f"trainer rank {me} of {len(members)} lost the store that the ranks meet by: "
                f"{lost}",
                remedy="look for the process that torch.distributed was set up by: it has ended",
            ) from lost
        except RuntimeError:  # each store has a class of its own for a wait that timed out
            continue
    told = str(store.get(key), "utf-8")
    store.delete_key(key)
    if told.startswith("!"):
        error = missing_ranks((), len(members), me=me, wait_s=wait_s, what="")
        raise UpdateFailedError(told[1:], remedy=error.remedy)
    return told[1:]


def _not_all(store: Store, members: Sequence[int], me: int, wait_s: float) -> UpdateFailedError:
    came = [rank for rank in members if store.check([_here(rank)]) or store.check([_left(rank)])]
    missing = [rank for rank in members if rank not in came]
    return missing_ranks(
        missing, len(members), me=me, wait_s=wait_s, what="did not come to meet the others"
    )


def _here(rank: int) -> str:
    return f"here/{rank}"


def _called(ticket: str) -> str:
    return f"called/{ticket}"


def _left(rank: int) -> str:
    """Of one that came and has given up waiting: it is not missing."""
    return f"left/{rank}"
