"""Which network devices UCX shall use for an agent, by the operator's word, GPU or address."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engine_plugins.errors import SettingsError, TransportError
from engine_plugins.weights.hardware.cuda_runtime import gpu_pci_address
from engine_plugins.weights.hardware.nic_locality import ports_of_gpu
from engine_plugins.weights.hardware.rdma_ports import (
    DEV,
    SYSFS,
    RdmaPort,
    gpu_places,
    network_interfaces,
    read_ports,
)

__all__ = ["INHERIT", "SETTING", "UCX_SETTING", "choose_devices", "current_gpu"]

logger = logging.getLogger(__name__)

SETTING = "ENGINE_PLUGINS_NET_DEVICES"
UCX_SETTING = "UCX_NET_DEVICES"
INHERIT = "inherit"
"""The value of our setting that leaves UCX's as it is."""

_DOWN = ("down", "lowerlayerdown", "notpresent")


def current_gpu() -> int | None:
    """The CUDA device that this thread computes on; `None` in a process that has used none."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def choose_devices(
    device_index: int | None,
    environ: Mapping[str, str] = os.environ,
    *,
    interfaces: Sequence[str] = (),
    net_devices: str | None = None,
    sysfs: Path = SYSFS,
    dev: Path = DEV,
    pci_address: Callable[[int], str] = gpu_pci_address,
) -> str | None:
    """Choose what `UCX_NET_DEVICES` shall be for an agent that is about to be made.

    The operator's word comes first: our setting, then UCX's own. Memory of a GPU travels over the
    RDMA ports nearest to it, whatever UCX's says. Anything else takes the interfaces over which
    this process is reached, and the RDMA ports that are up, which open no TCP port.

    Args:
        device_index: the CUDA device whose memory will travel; `None` where there is no GPU.
        environ: only read.
        interfaces: over which this process is reached; see `AgentNetwork`.
        net_devices: `ENGINE_PLUGINS_NET_DEVICES` where an engine's own configuration has it; what
            UCX calls them (`mlx5_0:1,mlx5_1:1`, `eth0`), or `inherit`.
        sysfs: where sysfs is mounted.
        dev: where device files are.
        pci_address: gives the PCI address of a CUDA device.

    Returns:
        Devices as UCX calls them; None leaves all of them to UCX.

    Raises:
        SettingsError: a device was named that this machine does not have.
        TransportError: a port is down: one that was named, or all that are nearest to the GPU.
    """
    inherited = environ.get(UCX_SETTING)
    wanted = net_devices or environ.get(SETTING) or ""
    ports = read_ports(sysfs, dev)
    if wanted == INHERIT:
        _check_named(inherited or "", f"{SETTING}={INHERIT} keeps {UCX_SETTING}", ports, sysfs)
        return inherited
    if wanted:
        _check_named(wanted, SETTING, ports, sysfs)
        return wanted
    if ports and device_index is not None:
        address = pci_address(device_index)
        chosen = ports_of_gpu(address, gpu_places(sysfs), ports)
        wanted = ",".join(port.name for port in chosen)
        _tell(wanted, inherited, f"GPU {device_index} ({address})")
        return wanted
    if inherited:
        return inherited
    if not interfaces:
        logger.warning(
            "nobody knows over which network this process is reached, so UCX listens on every one; "
            "name its devices in %s (docs/network-trust.md)",
            SETTING,
        )
        return None
    return ",".join([*interfaces, *(port.name for port in ports if port.is_up)])


def _tell(chosen: str, inherited: str | None, gpu: str) -> None:
    if inherited is None or inherited == chosen:
        logger.info("%s: %s=%s, the nearest to it", gpu, UCX_SETTING, chosen)
        return
    logger.warning(
        "%s: %s=%s was inherited and is overridden with %s, the nearest to it: one value for all "
        "processes sends their traffic through one port, and `all` may pick a far one; "
        "%s=%s keeps what is inherited",
        gpu,
        UCX_SETTING,
        inherited,
        chosen,
        SETTING,
        INHERIT,
    )


def _check_named(value: str, setting: str, ports: Sequence[RdmaPort], sysfs: Path) -> None:
    """Refuse names of a list that are not here, or are down. UCX's patterns are UCX's to judge."""
    rdma = {port.name: port for port in ports}
    interfaces = network_interfaces(sysfs)
    for name in (part.strip() for part in value.split(",")):
        if name in ("", "all") or not re.fullmatch(r"[\w.:-]+", name):
            continue
        if name in rdma and not rdma[name].is_up:
            raise TransportError(
                f"{setting}: RDMA port {name} is down ({rdma[name].condition})",
                remedy="bring it up (ibstat, ip link), or name another",
            )
        if interfaces.get(name, "up") in _DOWN:
            raise TransportError(
                f"{setting}: network interface {name} is {interfaces[name]}",
                remedy="bring it up (ip link), or name another",
            )
        if name not in rdma and name not in interfaces:
            there = ", ".join([*rdma, *interfaces]) or "none"
            raise SettingsError(
                f"{setting}: there is no network device {name!r} here; there are: {there}",
                remedy="name an RDMA device with its port (mlx5_0:1), or a network interface",
            )
