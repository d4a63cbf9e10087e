"""How much memory a rank may come to hold, and how much it holds."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from engine_plugins.cgroup_limit import tightest_cgroup
from engine_plugins.errors import SettingsError
from engine_plugins.settings import PREFIX
from engine_plugins.weights.hardware.peak_memory import resident_and_addresses

__all__ = [
    "UNLIMITED",
    "HostFigures",
    "MemoryCap",
    "MemoryFigures",
    "Reading",
    "device_cap",
    "read_host",
    "require_within",
    "resolve_cap",
]

UNLIMITED = 1 << 60
"""Bytes that no process comes to hold."""


class Reading(NamedTuple):
    """Bytes in use against the tightest of the caps.

    `left_bytes` is what can be had at all, whatever cap was configured; `None` if nobody looked.
    """

    used_bytes: int
    cap_bytes: int
    left_bytes: int | None = None

    @property
    def headroom_bytes(self) -> int:
        """What is left; negative beyond the cap."""
        return self.cap_bytes - self.used_bytes


class MemoryFigures(NamedTuple):
    """What a rank holds between two steps, and what it may come to hold, in bytes.

    `addresses` are those of its process; `address_limit` is `None` where they have none.
    `device_bytes` is the size of the GPU that the figures are of, `None` for the host.
    """

    used_bytes: int
    cap_bytes: int
    addresses: int = 0
    address_limit: int | None = None
    device_bytes: int | None = None

    @property
    def address_room(self) -> int:
        """Addresses that are left, where they are limited."""
        if self.address_limit is None:
            return UNLIMITED
        return self.address_limit - self.addresses

    def reading(self, configured_cap: int | None) -> Reading:
        """Against the cap with the least room; a configured one stands for what is free."""
        used, free, addresses, address_limit, _ = self
        cap = free if configured_cap is None else configured_cap
        if address_limit is None:
            return Reading(used, cap, free - used)
        left = min(free - used, address_limit - addresses)
        if address_limit - addresses < cap - used:
            return Reading(addresses, address_limit, left)
        return Reading(used, cap, left)


@dataclass(frozen=True, kw_only=True)
class HostFigures:
    """Memory of this process and of what it lives in, in bytes; `None` where there is no limit.

    Attributes:
        resident: of this process.
        machine_total: of the machine.
        machine_available: to a new process, without swapping.
        cgroup_limit: the tightest of this process's cgroups.
        cgroup_used: in that cgroup, without the page cache.
        address_space_limit: `RLIMIT_AS` of this process.
    """

    resident: int
    machine_total: int
    machine_available: int
    cgroup_limit: int | None = None
    cgroup_used: int = 0
    address_space_limit: int | None = None

    @classmethod
    def now(cls) -> HostFigures:
        """Read them.

        Of a process in a step what it holds grows or shrinks meanwhile: it is read twice, and the
        smaller counts, so that what is held and what is free are never too much together.
        """
        before, _ = resident_and_addresses()
        memory = psutil.virtual_memory()
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limit, used = tightest_cgroup()
        return cls(
            resident=min(before, resident_and_addresses()[0]),
            machine_total=memory.total,
            machine_available=memory.available,
            cgroup_limit=limit,
            cgroup_used=used,
            address_space_limit=None if soft == resource.RLIM_INFINITY else soft,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryCap:
    """Caps of one rank, in bytes.

    Attributes:
        resident_bytes: of what is resident, on the host or on the device.
        address_space_bytes: of addresses, where the process is limited in them.
        reason: where the first comes from.
    """

    resident_bytes: int
    address_space_bytes: int | None = None
    reason: str


def resolve_cap(configured: int | None, figures: HostFigures, *, ranks: int = 1) -> MemoryCap:
    """The cap of a rank on the CPU platform.

    Args:
        configured: `ENGINE_PLUGINS_PREFILL_CAP_BYTES`, or `None` for what is free.
        figures: of the rank's process.
        ranks: that take from the same free memory.

    Raises:
        SettingsError: the configured cap is above what the machine or a limit allows.
    """
    room = [
        ("the machine's memory", figures.machine_total, figures.machine_available),
        (
            "the cgroup's memory limit",
            figures.cgroup_limit,
            (figures.cgroup_limit or 0) - figures.cgroup_used,
        ),
        ("RLIMIT_AS", figures.address_space_limit, None),
    ]
    for what, limit, _ in room:
        require_within(configured, limit, what)
    reason, free = min(
        ((what, free) for what, limit, free in room if limit is not None and free is not None),
        key=lambda each: each[1],
    )
    cap = figures.resident + max(free, 0) // ranks
    if configured is not None:
        reason, cap = f"{PREFIX}PREFILL_CAP_BYTES", configured
    return MemoryCap(
        resident_bytes=cap, address_space_bytes=figures.address_space_limit, reason=reason
    )


def device_cap(*, free: int, ours: int) -> MemoryCap:
    """The cap of a rank on a GPU, where none is configured.

    Args:
        free: bytes of the GPU that nobody holds.
        ours: bytes that this rank holds.
    """
    return MemoryCap(resident_bytes=ours + free, reason="the GPU's free memory")


def read_host(cap: MemoryCap) -> MemoryFigures:
    """What this process uses now."""
    resident, addresses = resident_and_addresses()
    return MemoryFigures(resident, cap.resident_bytes, addresses, cap.address_space_bytes)


def require_within(configured: int | None, limit: int | None, what: str) -> None:
    """Refuse a configured cap above a limit.

    Raises:
        SettingsError: the text says which limit.
    """
    if configured is not None and limit is not None and configured > limit:
        raise SettingsError(
            f"{PREFIX}PREFILL_CAP_BYTES is {configured}, above {what} of {limit} bytes: the gate "
            "would let in what cannot fit",
            remedy="lower it, or leave it out",
        )
