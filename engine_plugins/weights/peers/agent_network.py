"""The networks that a process's agents are reached over: those of the addresses that name it.

UCX listens on every interface that it may use, and whoever has an agent's metadata can read and
write the whole process through it (docs/network-trust.md). So an agent gets the interfaces over
which trainers and engines already speak HTTP with each other, and no others.
"""

from __future__ import annotations

import ipaddress
import logging
import socket

import psutil

from engine_plugins.weights.hardware.network_devices import choose_devices, current_gpu
from engine_plugins.weights.transport.base import Transport

__all__ = ["AgentNetwork", "interface_of", "own_addresses_towards"]

logger = logging.getLogger(__name__)

_ANY_PORT = 9
"""For a UDP socket that is connected to find its route; nothing is sent."""


class AgentNetwork:
    """Chooses the network devices of one process's agents.

    Args:
        net_devices: `ENGINE_PLUGINS_NET_DEVICES` where an engine's own configuration has it.
    """

    def __init__(self, net_devices: str | None = None) -> None:
        self._net_devices = net_devices
        self._interfaces: dict[str, set[str]] = {}
        self._made_with: str | None = None
        self._made = False

    def reach(self, host: str) -> bool:
        """Note a host that agents shall be reachable from, or this process's own address.

        A name that cannot be resolved yet is looked up again the next time.

        Args:
            host: a name or an IP address.

        Returns:
            Whether the agents made so far lack the device that leads to it.

        Raises:
            SettingsError: see `choose_devices`.
            TransportError: see `choose_devices`.
        """
        if not self._interfaces.get(host):
            found = {interface_of(each) for each in own_addresses_towards(host)}
            self._interfaces[host] = {name for name in found if name is not None}
        return self._made and self._devices() != self._made_with

    def open(self, name: str) -> Transport:
        """Make an agent of NIXL on these devices.

        Raises:
            NotConfiguredError: NIXL is not installed.
            SettingsError: see `choose_devices`.
            TransportError: UCX does not start, or see `choose_devices`.
        """
        from engine_plugins.weights.transport.nixl import NixlTransport

        devices = self._devices()
        made = NixlTransport(name, net_devices=devices)
        self._made, self._made_with = True, devices
        return made

    def _devices(self) -> str | None:
        interfaces = sorted(set().union(*self._interfaces.values()))
        return choose_devices(current_gpu(), interfaces=interfaces, net_devices=self._net_devices)


def own_addresses_towards(host: str) -> set[str]:
    """This host's addresses that packets to another host bear, by the kernel's routes.

    Towards one of its own addresses that is the address itself. Nothing is sent. Empty where the
    name cannot be resolved or no route leads there.
    """
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return set()
    addresses = set()
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                addresses.add(str(probe.getsockname()[0]))
        except OSError:
            logger.debug("no route leads to %s", target[0])
    return addresses


def interface_of(address: str) -> str | None:
    """The network interface that bears an address of this host; None if none does."""
    wanted = _plain(address)
    if wanted is None:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            mine = _plain(each.address)
            if mine is None:
                continue
            # All of 127.0.0.0/8 is loopback's, although it bears only 127.0.0.1.
            if mine == wanted or (mine.is_loopback and wanted.is_loopback):
                return name.partition(":")[0]  # an alias (eth0:1) is no device of its own
    return None


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address without its zone, and as IPv4 where it is IPv4 in IPv6's clothes."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None  # of another family: Ethernet
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
