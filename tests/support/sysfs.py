"""Directory trees laid out as the kernel lays out sysfs: GPUs, RDMA ports, network interfaces."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine"]

ACTIVE = "4: ACTIVE"
DOWN = "1: DOWN"


@dataclass(kw_only=True)
class Machine:
    """A machine in a folder. Devices hang below `bridges`, the host bridge first."""

    root: Path

    @property
    def sysfs(self) -> Path:
        return self.root / "sys"

    @property
    def dev(self) -> Path:
        return self.root / "dev"

    def gpu(self, address: str, *bridges: str, numa: int = -1, vendor: str = "0x10de") -> None:
        folder = self._pci(address, bridges, numa)
        (folder / "class").write_text("0x030200\n")
        (folder / "vendor").write_text(f"{vendor}\n")

    def nic(
        self,
        name: str,
        address: str,
        *bridges: str,
        numa: int = -1,
        states: tuple[str, ...] = (ACTIVE,),
        rate: str = "400 Gb/sec (4X NDR)",
        link_layer: str = "InfiniBand",
        node_type: str = "1: CA",
        in_container: bool = True,
    ) -> None:
        """An RDMA device; without an address it is none on PCI (a soft one, or a hidden one)."""
        parent = self._pci(address, bridges, numa) if address else self.sysfs / "devices/virtual"
        folder = parent / "infiniband" / name
        folder.mkdir(parents=True)
        (folder / "node_type").write_text(f"{node_type}\n")
        if address:
            (folder / "device").symlink_to("../../../" + address)
        for number, state in enumerate(states, start=1):
            port = folder / "ports" / str(number)
            port.mkdir(parents=True)
            up = state == ACTIVE
            (port / "state").write_text(f"{state}\n")
            (port / "phys_state").write_text("5: LinkUp\n" if up else "3: Disabled\n")
            (port / "rate").write_text(f"{rate if up else '2.5 Gb/sec (1X SDR)'}\n")
            (port / "link_layer").write_text(f"{link_layer}\n")
        self._link("class/infiniband", folder)
        number = len(list((self.sysfs / "class/infiniband").iterdir())) - 1
        verbs = parent / "infiniband_verbs" / f"uverbs{number}"
        verbs.mkdir(parents=True)
        (verbs / "ibdev").write_text(f"{name}\n")
        self._link("class/infiniband_verbs", verbs)
        if in_container:
            (self.dev / "infiniband").mkdir(parents=True, exist_ok=True)
            (self.dev / "infiniband" / verbs.name).touch()

    def interface(self, name: str, operstate: str = "up") -> None:
        folder = self.sysfs / "devices/virtual/net" / name
        folder.mkdir(parents=True)
        (folder / "operstate").write_text(f"{operstate}\n")
        self._link("class/net", folder)

    def _pci(self, address: str, bridges: tuple[str, ...], numa: int) -> Path:
        folder = self.sysfs.joinpath("devices", *bridges, address)
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{numa}\n")
        (folder / "class").write_text("0x020700\n")
        (folder / "vendor").write_text("0x15b3\n")
        self._link("bus/pci/devices", folder)
        return folder

    def _link(self, where: str, target: Path) -> None:
        folder = self.sysfs / where
        folder.mkdir(parents=True, exist_ok=True)
        (folder / target.name).symlink_to(os.path.relpath(target, folder))
