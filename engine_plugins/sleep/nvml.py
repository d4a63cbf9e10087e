"""The driver's own account of a GPU, through NVML in this process.

NVML stays open from the first question on: opening it costs more than all that is asked.
"""

from __future__ import annotations

import os
from typing import Any

import pynvml

from engine_plugins.sleep.gpu_processes import GpuListing, GpuProcess
from engine_plugins.sleep.memory_report import GpuDevice, Reason, Rung

__all__ = ["Nvml"]

_REASONS: dict[int, Reason] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "nvml_missing",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "nvml_missing",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "nvml_symbol_missing",
    pynvml.NVML_ERROR_GPU_IS_LOST: "gpu_lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "gpu_lost",
    pynvml.NVML_ERROR_NOT_FOUND: "gpu_not_found",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "gpu_not_found",
    pynvml.NVML_ERROR_NO_PERMISSION: "no_permission",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not_supported",
}
_ABSENT = (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED)


class Nvml:
    """Asks NVML about one GPU after the other."""

    def __init__(self) -> None:
        self._opened_by: int | None = None

    def processes(self, device: GpuDevice) -> GpuListing:
        """The processes that compute on a GPU, those under MPS included."""
        try:
            handle = self._handle(device)
            if self._is_mig(handle):
                detail = f"{device.uuid} is cut into MIG instances"
                return GpuListing(source="nvml", reason="mig", detail=detail)
            found = [*_listed("Compute", handle), *self._mps_processes(handle)]
        except pynvml.NVMLError as error:
            return GpuListing(source="nvml", reason=self._why(error), detail=f"NVML: {error}")
        listed = [GpuProcess(pid=each.pid, used_bytes=each.usedGpuMemory) for each in found]
        return GpuListing(source="nvml", processes=listed)

    def whole_gpu(self, device: GpuDevice) -> Rung:
        """What everybody holds on the GPU, without what the driver reserves for itself if it says.

        A MIG instance is a part of its GPU, so the GPU's figure bounds it as well.
        """
        try:
            handle = self._handle(device)
            try:
                used = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used
            except pynvml.NVMLError as error:
                if error.value not in _ABSENT:
                    raise
                used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        except pynvml.NVMLError as error:
            return Rung(source="whole_gpu", reason=self._why(error), detail=f"NVML: {error}")
        if not used:
            return Rung(source="whole_gpu", reason="zero_bytes", detail="0 bytes, which cannot be")
        return Rung(
            source="whole_gpu",
            resident_bytes=int(used),
            quality="upper_bound",
            reason="whole_gpu_only",
            group="gpu",
        )

    def _handle(self, device: GpuDevice) -> Any:
        if self._opened_by != os.getpid():
            pynvml.nvmlInit()
            self._opened_by = os.getpid()
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        except pynvml.NVMLError as error:
            # CUDA names a MIG instance where NVML knows the GPU; both know its place.
            if error.value != pynvml.NVML_ERROR_NOT_FOUND or not device.pci_address:
                raise
        return pynvml.nvmlDeviceGetHandleByPciBusId(device.pci_address)

    def _why(self, error: Any) -> Reason:
        if error.value == pynvml.NVML_ERROR_UNINITIALIZED:
            self._opened_by = None  # others in this process closed more often than they opened
        return _REASONS.get(error.value, "nvml_error")

    def _is_mig(self, handle: Any) -> bool:
        try:
            current, _ = pynvml.nvmlDeviceGetMigMode(handle)
        except pynvml.NVMLError as error:
            if error.value in _ABSENT:
                return False
            raise
        return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)

    def _mps_processes(self, handle: Any) -> list[Any]:
        try:
            return _listed("MPSCompute", handle)
        except pynvml.NVMLError as error:
            if error.value in _ABSENT:
                return []
            raise


def _listed(kind: str, handle: Any) -> list[Any]:
    """By the newest function that the driver has: the bindings' own choice is not for old ones."""
    name = f"nvmlDeviceGet{kind}RunningProcesses"
    try:
        return list(getattr(pynvml, f"{name}_v3")(handle))
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
    return list(getattr(pynvml, f"{name}_v2")(handle))
