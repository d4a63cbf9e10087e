"""The GPU that a rank computes on, by the names that a driver knows it by."""

from __future__ import annotations

from functools import partial

import psutil
import torch

from engine_plugins.sleep.memory_report import GpuDevice
from engine_plugins.sleep.process_identity import ProcessIdentity
from engine_plugins.sleep.rank_memory import RankMemory
from engine_plugins.weights.hardware.cuda_runtime import gpu_pci_address

__all__ = ["free_bytes", "gpu_device", "rank_memory"]


def rank_memory(
    tp_rank: int, device: torch.device | str, *, engine: ProcessIdentity | None = None
) -> RankMemory:
    """The measure of a rank that computes on a device of torch's; `engine` as for `RankMemory`.

    torch's allocator is not asked: what a memory saver has released still counts as reserved there.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return RankMemory(tp_rank, None)
    ordinal = torch.cuda.current_device() if device == torch.device("cuda") else device.index
    return RankMemory(
        tp_rank,
        gpu_device(ordinal),
        whole_gpu_bytes=partial(_used_by_everybody, ordinal),
        engine=engine,
    )


def free_bytes(device: GpuDevice | None) -> int:
    """Bytes that this rank could map now, on its GPU or, without one, on this host."""
    if device is None:
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info()
    return free


def gpu_device(ordinal: int) -> GpuDevice:
    """The names of a CUDA device of this process."""
    uuid = torch.cuda.get_device_properties(ordinal).uuid
    return GpuDevice(uuid=f"GPU-{uuid}", pci_address=gpu_pci_address(ordinal))


def _used_by_everybody(ordinal: int) -> int:
    free, total = torch.cuda.mem_get_info(ordinal)
    return total - free
