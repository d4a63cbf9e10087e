"""How much host memory is surely free: what the machine and every limit of this process leave."""

from __future__ import annotations

import resource

import psutil

from engine_plugins.cgroup_limit import tightest_cgroup
from engine_plugins.weights.hardware.peak_memory import resident_and_addresses

__all__ = ["surely_free_bytes"]


def surely_free_bytes() -> int:
    """Bytes that this process can still take, without swapping and without the kernel ending it.

    The least of what the machine has available, what each cgroup above this process has left of
    its limit, and what `RLIMIT_AS` leaves of addresses. Memory that is reserved but was never
    written to, here or in another process, still counts as free.
    """
    free = [int(psutil.virtual_memory().available)]
    limit, used = tightest_cgroup()
    if limit is not None:
        free.append(limit - used)
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        free.append(addresses - resident_and_addresses()[1])
    return max(min(free), 0)
