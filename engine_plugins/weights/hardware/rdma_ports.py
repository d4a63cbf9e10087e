"""RDMA ports and GPUs of this machine, and where they sit on PCI: as sysfs tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEV", "SYSFS", "PciPlace", "RdmaPort", "gpu_places", "network_interfaces", "read_ports"]

SYSFS = Path("/sys")
DEV = Path("/dev")

_CHANNEL_ADAPTER = "1:"
"""`node_type` of what UCX drives through verbs: InfiniBand and RoCE, not iWARP, not EFA."""
_DISPLAY_CLASS = "0x03"
_GPU_VENDORS = ("0x10de", "0x1002")


@dataclass(frozen=True, kw_only=True)
class PciPlace:
    """Where a device hangs.

    Attributes:
        path: names from the host bridge down to the device, both included.
        numa: NUMA node; -1 where the machine does not say.
    """

    path: tuple[str, ...]
    numa: int


@dataclass(frozen=True, kw_only=True)
class RdmaPort:
    """One port of an RDMA device.

    Attributes:
        device: its name (`mlx5_0`).
        port: its number, from 1.
        condition: what the kernel says of it (`ACTIVE, LinkUp`).
        rate_gbps: line rate in Gb/s; 0 where unknown. Of a port that is down it means nothing.
        place: where the device hangs; `None` where the machine does not say.
    """

    device: str
    port: int
    condition: str
    rate_gbps: float
    place: PciPlace | None

    @property
    def name(self) -> str:
        """The port as UCX calls it (`mlx5_0:1`)."""
        return f"{self.device}:{self.port}"

    @property
    def is_up(self) -> bool:
        """Whether bytes can pass: the link is trained, and a fabric or network has taken it in."""
        return self.condition == "ACTIVE, LinkUp"


def read_ports(sysfs: Path = SYSFS, dev: Path = DEV) -> list[RdmaPort]:
    """The ports that this process could open, up or down, in the order of their bus addresses.

    A container sees the devices of the whole machine in sysfs, and may open those that have their
    verbs device in `/dev/infiniband`.
    """
    ports = [
        _read_port(folder, number)
        for folder in _entries(sysfs / "class/infiniband")
        if _text(folder / "node_type").startswith(_CHANNEL_ADAPTER)
        and _may_open(folder.name, sysfs, dev)
        for number in _entries(folder / "ports")
        if number.name.isdigit()
    ]
    return sorted(ports, key=_bus_order)


def gpu_places(sysfs: Path = SYSFS) -> dict[str, PciPlace | None]:
    """Every GPU of the machine by its PCI address, whether this process may use it or not."""
    return {
        folder.name: _place(folder)
        for folder in _entries(sysfs / "bus/pci/devices")
        if _text(folder / "class").startswith(_DISPLAY_CLASS)
        and _text(folder / "vendor") in _GPU_VENDORS
    }


def network_interfaces(sysfs: Path = SYSFS) -> dict[str, str]:
    """Network interfaces and their state (`up`, `down`; of loopback `unknown`)."""
    folders = _entries(sysfs / "class/net")
    return {folder.name: _text(folder / "operstate") or "unknown" for folder in folders}


def _read_port(device: Path, port: Path) -> RdmaPort:
    state, physical = (_after_number(_text(port / name)) for name in ("state", "phys_state"))
    rate = re.match(r"[\d.]+", _text(port / "rate"))
    return RdmaPort(
        device=device.name,
        port=int(port.name),
        condition=f"{state}, {physical}",
        rate_gbps=float(rate.group()) if rate else 0.0,
        place=_place(device / "device"),
    )


def _may_open(device: str, sysfs: Path, dev: Path) -> bool:
    verbs = [
        folder.name
        for folder in _entries(sysfs / "class/infiniband_verbs")
        if _text(folder / "ibdev") == device
    ]
    return any((dev / "infiniband" / name).exists() for name in verbs)


def _place(device: Path) -> PciPlace | None:
    if not device.exists():
        return None
    parts = device.resolve().parts
    bridges = [index for index, part in enumerate(parts) if re.match(r"pci[0-9a-f]+:", part)]
    if not bridges:
        return None
    numa = _text(device / "numa_node")
    return PciPlace(path=parts[bridges[-1] :], numa=int(numa) if numa.isdigit() else -1)


def _bus_order(port: RdmaPort) -> tuple[object, ...]:
    address = port.place.path[-1] if port.place else ""
    digits = [int(part) for part in re.findall(r"\d+", port.device)]
    return (address, digits, port.device, port.port)


def _after_number(text: str) -> str:
    """`ACTIVE` of the kernel's `4: ACTIVE`."""
    return text.partition(":")[2].strip() or "unknown"


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _text(file: Path) -> str:
    """What a sysfs file says; nothing where it is absent or its device does not answer."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
