"""Which of the processes that a driver lists on a GPU are a rank's, and what they hold together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from engine_plugins.sleep.memory_report import Reason, Rung
from engine_plugins.sleep.process_identity import HOST_NAMESPACE, own_namespace
from engine_plugins.sleep.process_tree import ProcessTree

__all__ = ["GpuListing", "GpuProcess", "PidProof", "attribute"]


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process as a driver lists it; `used_bytes` is `None` where it does not say."""

    pid: int
    used_bytes: int | None


class GpuListing(msgspec.Struct, frozen=True, kw_only=True):
    """The processes on a GPU, or the reason why they are not known."""

    source: Literal["nvml", "nvidia_smi"]
    processes: list[GpuProcess] = []
    per_gpu: bool = True
    """False where the tool gives a process's memory on all GPUs together."""
    reason: Reason = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class PidProof:
    """How it is known that listed pids are those of this process's namespace.

    In the driver's own namespace they are. In a container a driver either lists the host's pids,
    which cannot be told from ours by their numbers, or translates them. It translates if every
    process that it lists on the GPU exists here and has the GPU's device files open: host pids
    that happen to be pids here as well would have to be those of processes on this very GPU.

    Attributes:
        driver_namespace: inode of the pid namespace whose pids the driver lists.
        device_files: what the paths of the driver's device files begin with.
    """

    driver_namespace: int = HOST_NAMESPACE
    device_files: str = "/dev/nvidia"

    def missing_for(self, listed: Iterable[int]) -> tuple[Reason, str]:
        """Why the proof fails for listed pids; an empty reason if it holds."""
        if own_namespace() == self.driver_namespace:
            return "", ""
        # Pid 0 is a process that a translating driver hides.
        strangers = [pid for pid in listed if pid and not self._holds_gpu(pid)]
        if strangers:
            return "foreign_pids", (
                f"this process is in a pid namespace of its own, and {strangers[0]} is no process "
                "on the GPU here: the driver lists the host's pids"
            )
        return "", ""

    def _holds_gpu(self, pid: int) -> bool:
        try:
            with os.scandir(f"/proc/{pid}/fd") as opened:
                return any(self._is_device(Path(each.path)) for each in opened)
        except OSError:
            return False

    def _is_device(self, descriptor: Path) -> bool:
        try:
            return str(descriptor.readlink()).startswith(self.device_files)
        except OSError:
            return False


def attribute(listing: GpuListing, rank: ProcessTree, proof: PidProof) -> Rung:
    """What the rank's processes hold on the GPU; unknown rather than 0 wherever it is not said."""

    def unknown(reason: Reason, detail: str) -> Rung:
        return Rung(source=listing.source, reason=reason, detail=detail)

    if listing.reason:
        return unknown(listing.reason, listing.detail)
    if rank.root_pid() is None:
        return unknown(*rank.absence())
    pids = {each.pid for each in listing.processes}
    reason, detail = proof.missing_for(pids)
    if reason:
        return unknown(reason, detail)
    figures = _figures(listing.processes, rank)
    if not figures:
        return unknown("no_match", f"{len(pids)} processes on the GPU, none of them the rank's")
    known = [nbytes for nbytes in figures.values() if nbytes]
    if not known and None in figures.values():
        return unknown("not_available", f"no figure for {sorted(figures)}")
    if not known:
        return unknown("zero_bytes", f"0 bytes for {sorted(figures)}, which cannot be")
    total = Rung(source=listing.source, resident_bytes=sum(known), quality="exact")
    if len(known) < len(figures):
        lacking = sorted(pid for pid, nbytes in figures.items() if not nbytes)
        return msgspec.structs.replace(
            total,
            quality="lower_bound",
            reason="partly_unknown",
            detail=f"no figure for {lacking}, one for {len(known)} more",
        )
    if not listing.per_gpu:
        return msgspec.structs.replace(
            total,
            quality="upper_bound",
            reason="no_bus_id",
            detail="this nvidia-smi gives a process's memory on all GPUs together",
        )
    return total


def _figures(listed: Iterable[GpuProcess], rank: ProcessTree) -> dict[int, int | None]:
    """By pid of the rank's processes. Under MPS a process may be listed twice."""
    figures: dict[int, int | None] = {}
    for each in listed:
        sight = rank.sight(each.pid)
        if sight != "foreign":
            nbytes = each.used_bytes if sight == "here" else None
            figures[each.pid] = max(figures.get(each.pid, nbytes), nbytes, key=lambda n: n or 0)
    return figures
