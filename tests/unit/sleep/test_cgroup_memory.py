"""What dmem.current says is the engine's where nobody else is in the cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine_plugins.sleep.cgroup_memory import cgroup_memory
from engine_plugins.sleep.memory_report import GpuDevice, Rung

GPU = GpuDevice(uuid="GPU-a", pci_address="0000:1a:00.0")


class Group:
    """This process's cgroup in a tree made by hand."""

    def __init__(self, root: Path) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = [line[3:] for line in lines if line.startswith("0::")]
        if not own:
            pytest.skip("this machine has no cgroup of version 2")
        self.root, self.name = root, own[0]
        self.folder = root / self.name.lstrip("/")
        self.members(os.getpid())

    def members(self, *pids: int, below: str = "") -> None:
        folder = self.folder / below
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def charge(self, *lines: str) -> None:
        (self.folder / "dmem.current").write_text("".join(f"{line}\n" for line in lines))

    def ask(self, *ours: int, device: GpuDevice = GPU) -> Rung:
        return cgroup_memory(
            os.getpid(), device, ours=lambda pid: pid in (os.getpid(), *ours), root=self.root
        )


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_every_region_of_the_gpu_counts_and_no_other_gpus(group: Group) -> None:
    group.charge(
        "drm/0000:1a:00.0/vram0 700", "drm/0000:1A:00.0/stolen 50", "drm/0000:2a:00.0/vram0 9"
    )
    rung = group.ask()
    assert (rung.resident_bytes, rung.quality, rung.reason) == (750, "exact", "")
    assert rung.group == f"cgroup:{group.name}"


def test_processes_of_cgroups_below_count_as_members(group: Group) -> None:
    """The kernel charges their memory to this one as well."""
    group.charge("drm/0000:1a:00.0/vram0 700")
    group.members(8, below="helper")
    assert group.ask(8).quality == "exact"
    shared = group.ask()
    assert (shared.resident_bytes, shared.quality, shared.reason) == (
        700,
        "upper_bound",
        "cgroup_shared",
    )
    assert "process 8" in shared.detail


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["drm/0000:2a:00.0/vram0 700"], "no_dmem"),
        ([], "no_dmem"),
        (["drm/0000:1a:00.0/vram0 max"], "no_dmem"),
        (["drm/0000:1a:00.0/vram0 0"], "zero_bytes"),
    ],
)
def test_what_is_not_told_is_unknown(group: Group, lines: list[str], reason: str) -> None:
    group.charge(*lines)
    rung = group.ask()
    assert (rung.resident_bytes, rung.quality, rung.reason) == (None, "unknown", reason)
    assert rung.detail


def test_an_older_kernel_and_a_gpu_without_a_place_have_no_account(group: Group) -> None:
    assert group.ask().reason == "no_dmem"
    group.charge("drm/0000:1a:00.0/vram0 700")
    assert group.ask(device=GpuDevice(uuid="GPU-a")).reason == "no_dmem"
