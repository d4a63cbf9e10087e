"""A GPU's memory as the kernel charges it to the engine's cgroup (`dmem`, Linux 6.14 and later)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine_plugins.sleep.memory_report import GpuDevice, Rung
from engine_plugins.sleep.pci_address import sysfs_pci_address

__all__ = ["CGROUPS", "cgroup_memory"]

CGROUPS = Path("/sys/fs/cgroup")


def cgroup_memory(
    pid: int, device: GpuDevice, *, ours: Callable[[int], bool], root: Path = CGROUPS
) -> Rung:
    """What the cgroup of a process holds on a GPU.

    Exact, for all ranks of the cgroup together, if every process in it is the engine's; otherwise
    an upper bound.

    Args:
        pid: the process, as seen here.
        device: the GPU; it needs its PCI address.
        ours: whether a process, as seen here, belongs to the engine.
        root: where cgroup v2 is mounted.
    """
    try:
        group = _group_of(pid)
        folder = root / group.lstrip("/")
        charged = _charged(folder / "dmem.current", device)
        stranger = next((each for each in _members(folder) if not ours(each)), None)
    except (OSError, ValueError) as error:
        return Rung(source="cgroup", reason="no_dmem", detail=f"{error}")
    if charged is None:
        detail = f"{folder}/dmem.current does not name {device.pci_address or 'the GPU'}"
        return Rung(source="cgroup", reason="no_dmem", detail=detail)
    if not charged:
        detail = f"{folder}/dmem.current says 0 bytes, which cannot be"
        return Rung(source="cgroup", reason="zero_bytes", detail=detail)
    shared = stranger is not None
    return Rung(
        source="cgroup",
        resident_bytes=charged,
        quality="upper_bound" if shared else "exact",
        reason="cgroup_shared" if shared else "",
        detail=f"process {stranger} in {group} is not the engine's" if shared else "",
        group=f"cgroup:{group}",
    )


def _group_of(pid: int) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise ValueError("the process is in no cgroup of version 2")


def _charged(file: Path, device: GpuDevice) -> int | None:
    """Bytes of all regions of the device; a line is `drm/0000:1a:00.0/vram0 12550144`."""
    figures = []
    for line in file.read_text().splitlines():
        region, _, nbytes = line.rpartition(" ")
        if device.pci_address and device.pci_address in map(_as_address, region.split("/")):
            figures.append(int(nbytes))
    return sum(figures) if figures else None


def _as_address(part: str) -> str:
    try:
        return sysfs_pci_address(part)
    except ValueError:
        return ""


def _members(folder: Path) -> list[int]:
    """The cgroup's processes and those of cgroups below, which it is charged for as well."""
    files = folder.rglob("cgroup.procs")
    return [int(pid) for file in files for pid in file.read_text().split()]
