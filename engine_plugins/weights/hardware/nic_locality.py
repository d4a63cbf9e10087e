"""Which RDMA ports serve which GPU: the nearest that are up, dealt out among GPUs as near."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import IntEnum

from engine_plugins.errors import TransportError
from engine_plugins.weights.hardware.rdma_ports import PciPlace, RdmaPort

__all__ = ["Nearness", "nearness", "ports_of_gpu"]

logger = logging.getLogger(__name__)

SLOWEST_SHARE = 0.5
"""A port below this share of the machine's fastest is one for management or storage."""


class Nearness(IntEnum):
    """What two PCI devices have in common; the smaller the nearer."""

    SWITCH = 0
    """A PCI bridge below the host bridge: bytes between them do not reach the processor."""
    HOST_BRIDGE = 1
    NUMA_NODE = 2
    NOTHING = 3
    """Or nobody knows, as in many virtual machines."""


def nearness(one: PciPlace | None, other: PciPlace | None) -> tuple[Nearness, int]:
    """How near two devices are, for comparison; behind one switch also by hops."""
    if one is None or other is None:
        return (Nearness.NOTHING, 0)
    shared = 0
    for left, right in zip(one.path[:-1], other.path[:-1], strict=False):
        if left != right:
            break
        shared += 1
    if shared > 1:
        return (Nearness.SWITCH, len(one.path) + len(other.path) - 2 * shared)
    if shared:
        return (Nearness.HOST_BRIDGE, 0)
    if one.numa >= 0 and one.numa == other.numa:
        return (Nearness.NUMA_NODE, 0)
    return (Nearness.NOTHING, 0)


def ports_of_gpu(
    address: str, gpus: Mapping[str, PciPlace | None], ports: Sequence[RdmaPort]
) -> list[RdmaPort]:
    """The ports that the GPU at a PCI address shall use.

    Args:
        address: `0000:18:00.0`; where `gpus` does not have it, it is near to nothing.
        gpus: every GPU of the machine, since those as near to the same ports share them.
        ports: every port that may be opened, in bus order; at least one.

    Raises:
        TransportError: the ports nearest to the GPU are all down.
    """
    gpus = {address: None, **gpus}
    near = _nearest(gpus[address], ports)
    up = [port for port in near if port.is_up]
    down = ", ".join(f"{port.name} ({port.condition})" for port in near if not port.is_up)
    if not up:
        raise TransportError(
            f"GPU {address}: no RDMA port near to it is up: {down}; over another port its traffic "
            "would cross the machine and share that port with other GPUs",
            remedy="bring the port up (ibstat, ip link), or name the port to use in "
            "ENGINE_PLUGINS_NET_DEVICES",
        )
    if down:
        logger.warning("GPU %s: left out of the RDMA ports near to it: %s", address, down)
    sharers = sorted(each for each in gpus if _nearest(gpus[each], ports) == near)
    return _dealt(up, sharers.index(address), len(sharers))


def _nearest(gpu: PciPlace | None, ports: Sequence[RdmaPort]) -> list[RdmaPort]:
    fastest = max((port.rate_gbps for port in ports if port.is_up), default=0.0)
    fit = [p for p in ports if not p.is_up or p.rate_gbps >= SLOWEST_SHARE * fastest]
    best = min(nearness(gpu, port.place) for port in fit)
    return [port for port in fit if nearness(gpu, port.place) == best]


def _dealt(ports: Sequence[RdmaPort], player: int, players: int) -> list[RdmaPort]:
    """A player's share: neighbours of its own, or one that others have as well."""
    first = player * len(ports) // players
    return list(ports[first : max(first + 1, (player + 1) * len(ports) // players)])
