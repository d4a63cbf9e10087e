"""Which of the processes that a driver lists on a GPU are a rank's, and what they hold together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from engine_plugins.sleep.memory_report import Quality, Reason, Rung
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
    worker = rank.root_pid()
    why: tuple[Reason, str]
    if listing.reason:
        why = listing.reason, listing.detail
    elif worker is None:
        why = rank.absence()
    else:
        why = proof.missing_for({each.pid for each in listing.processes})
    if why[0]:
        return Rung(source=listing.source, reason=why[0], detail=why[1])
    return _total(listing, _figures(listing.processes, rank), worker)


def _total(listing: GpuListing, figures: dict[int, int | None], worker: int | None) -> Rung:
    def rung(quality: Quality, reason: Reason = "", detail: str = "") -> Rung:
        return Rung(
            source=listing.source,
            resident_bytes=sum(known) if known else None,
            quality=quality,
            reason=reason,
            detail=detail,
        )

    known = [nbytes for nbytes in figures.values() if nbytes]
    lacking = sorted(pid for pid, nbytes in figures.items() if not nbytes)
    if not figures:
        others = len(listing.processes)
        return rung(
            "unknown", "no_match", f"{others} processes on the GPU, none of them the rank's"
        )
    if not known and None in figures.values():
        return rung("unknown", "not_available", f"no figure for {lacking}")
    if not known:
        return rung("unknown", "zero_bytes", f"0 bytes for {lacking}, which cannot be")
    if lacking:
        return rung("lower_bound", "partly_unknown", f"no figure for {lacking}")
    if worker not in figures:
        detail = f"{sorted(figures)} are listed and the worker, {worker}, is not"
        return rung("lower_bound", "partly_unknown", detail)
    if not listing.per_gpu:
        detail = "this nvidia-smi gives a process's memory on all GPUs together"
        return rung("upper_bound", "no_bus_id", detail)
    return rung("exact")


def _figures(listed: Iterable[GpuProcess], rank: ProcessTree) -> dict[int, int | None]:
    """By pid of the rank's processes. Under MPS a process may be listed twice."""
    figures: dict[int, int | None] = {}
    for each in listed:
        sight = rank.sight(each.pid)
        if sight != "foreign":
            nbytes = each.used_bytes if sight == "here" else None
            figures[each.pid] = max(figures.get(each.pid, nbytes), nbytes, key=lambda n: n or 0)
    return figures
