"""Memory that bytes may still come into: kept and counted until none can, and freed then.

What ends it is that every transfer into it has ended after all, that whoever writes to it is gone,
or, of reads of our own, that their agent is closed: nothing else would put the bytes there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine_plugins.errors import TransportError
from engine_plugins.weights.transport.base import Transport

__all__ = ["agent_closed", "keep", "quarantined_bytes", "reclaim"]

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Kept:
    transport: Transport
    address: int
    nbytes: int
    ended: Callable[[], bool]
    ends_with_agent: bool
    free: Callable[[], None]


_kept: list[_Kept] = []
_changing = threading.Lock()


def keep(
    transport: Transport,
    address: int,
    nbytes: int,
    *,
    free: Callable[[], None],
    ended: Callable[[], bool] = lambda: False,
    ends_with_agent: bool = True,
) -> None:
    """Keep registered memory until nothing can come into it.

    Args:
        transport: the agent that it is registered with.
        address: of its first byte.
        nbytes: its size in bytes.
        free: gives the memory back, once; whoever holds it until then is this function.
        ended: whether it is known that no more bytes will come; asked while the agent is open.
        ends_with_agent: whether none can come once the agent is closed. A peer of the same host
            may write past the agent, into whatever lies there.
    """
    with _changing:
        _kept.append(
            _Kept(
                transport=transport,
                address=address,
                nbytes=nbytes,
                ended=ended,
                ends_with_agent=ends_with_agent,
                free=free,
            )
        )


def quarantined_bytes(transport: Transport | None = None) -> int:
    """Bytes that this process cannot use: of one agent, or of all."""
    with _changing:
        return sum(each.nbytes for each in _kept if transport in (None, each.transport))


def reclaim(transport: Transport) -> int:
    """Deregister and free what has ended of an open agent's; say how many bytes that was."""
    with _changing:
        mine = [each for each in _kept if each.transport is transport]
    freed = 0
    for each in mine:
        if each.ended():
            _drop(each, registered=True)
            freed += each.nbytes
    if freed:
        logger.info("%.3f GiB are usable again: nothing comes into them any more", freed / 2**30)
    return freed


def agent_closed(transport: Transport) -> None:
    """Free what only this agent could have brought bytes into; its registrations are gone."""
    with _changing:
        mine = [each for each in _kept if each.transport is transport and each.ends_with_agent]
    for each in mine:
        _drop(each, registered=False)


def _drop(kept: _Kept, *, registered: bool) -> None:
    with _changing:
        if kept not in _kept:
            return
        _kept.remove(kept)
    if registered:
        try:
            kept.transport.deregister(kept.address)
        except TransportError:
            logger.warning("a region at %#x stays registered", kept.address, exc_info=True)
    kept.free()
