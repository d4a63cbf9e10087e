"""The processes on a GPU as nvidia-smi lists them: the last resort where NVML cannot be loaded."""

from __future__ import annotations

import logging
import subprocess

from engine_plugins.sleep.gpu_processes import GpuListing, GpuProcess
from engine_plugins.sleep.memory_report import GpuDevice, Reason
from engine_plugins.sleep.pci_address import sysfs_pci_address

__all__ = ["smi_processes"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 3.0
_MIB = 1 << 20


def smi_processes(device: GpuDevice) -> GpuListing:
    """Ask nvidia-smi; one without `gpu_bus_id` gives a process's memory on all GPUs together."""
    try:
        try:
            lines = _ask("gpu_bus_id,pid,used_memory")
        except subprocess.CalledProcessError as error:
            if "gpu_bus_id" not in f"{error.stdout}{error.stderr}":
                raise
            logger.warning(
                "this nvidia-smi knows no gpu_bus_id: memory is told by process, not by GPU"
            )
            return GpuListing(
                source="nvidia_smi", processes=_added(_ask("pid,used_memory")), per_gpu=False
            )
        listed = [
            _process(pid, used)
            for place, pid, used in lines
            if sysfs_pci_address(place) == device.pci_address
        ]
        return GpuListing(source="nvidia_smi", processes=listed)
    except FileNotFoundError:
        return _failed("nvidia_smi_missing", "there is no nvidia-smi on the path")
    except subprocess.CalledProcessError as error:
        said = f"{error.stdout}{error.stderr}".strip()
        return _failed("nvidia_smi_failed", f"nvidia-smi ended with {error.returncode}: {said}")
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError) as error:
        return _failed("nvidia_smi_failed", f"nvidia-smi: {error}")


def _ask(fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-compute-apps={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def _added(lines: list[list[str]]) -> list[GpuProcess]:
    """One entry for each process, which has a line for each of its GPUs."""
    total: dict[int, int | None] = {}
    for each in (_process(*line) for line in lines):
        before, here = total.get(each.pid, 0), each.used_bytes
        total[each.pid] = None if before is None or here is None else before + here
    return [GpuProcess(pid=pid, used_bytes=used) for pid, used in total.items()]


def _process(pid: str, used: str) -> GpuProcess:
    """A figure is MiB; `[N/A]` and its like are none."""
    return GpuProcess(pid=int(pid), used_bytes=int(used) * _MIB if used.isdecimal() else None)


def _failed(reason: Reason, detail: str) -> GpuListing:
    return GpuListing(source="nvidia_smi", reason=reason, detail=detail)
