"""torch_memory_saver's real binaries on a fake CUDA driver, compiled by the tests.

It is found by LD_LIBRARY_PATH, so in processes of its own only: an engine that found it might take
this machine for one with a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine_plugins.sleep.hook_mode import HookMode
from engine_plugins.sleep.memory_saver import load_memory_saver

__all__ = ["FakeGpu", "start_environment"]

_SOURCE = Path(__file__).with_name("fake_cuda_driver.c")


def start_environment(folder: Path, mode: HookMode) -> dict[str, str]:
    """Build the driver; the result is what a process of this hook mode must start with."""
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    _compile(driver)
    # Versions of symbols are the library's name there, which is what the binaries ask for.
    _compile(runtime, str(driver), "-DRUNTIME", "-Wl,--default-symver")
    package = importlib.util.find_spec("torch_memory_saver")
    assert package is not None
    assert package.origin is not None
    binary = "torch_memory_saver_hook_mode_preload_cu13.abi3.so"
    preload = str(Path(package.origin).parents[1] / binary) if mode == "preload" else ""
    return {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}


class FakeGpu:
    """What a process that was started so has: the library, its regions, the device's memory."""

    def __init__(self, mode: HookMode) -> None:
        library: Any = load_memory_saver(mode)
        self._mode = mode
        # A build of torch without CUDA has no such allocator to plug the library's functions into.
        stand_in = mock.patch.object(torch._C, "_cuda_customAllocator", mock.Mock(), create=True)
        with stand_in if mode == "torch" else nullcontext():
            library._ensure_initialized()
        self.saver = library
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.fake_cuda_free.restype = ctypes.c_uint64

    def region(self, tag: str, nbytes: int, *, cpu_backup: bool = False) -> torch.Tensor:
        """Memory of a region as torch's allocator gets it there: `[nbytes]` bytes."""
        options = {"enable_cpu_backup": cpu_backup, "cpu_backup_backend": None}
        with self.saver._impl._with_region_config(tag=tag, **options):
            return torch.frombuffer(
                (ctypes.c_uint8 * nbytes).from_address(self._allocated(nbytes)), dtype=torch.uint8
            )

    def free_bytes(self) -> int:
        """Bytes that are free on the device."""
        return int(self._driver.fake_cuda_free())

    def take(self, nbytes: int) -> ctypes.c_void_p:
        """Memory of the device that somebody else uses now."""
        handle = ctypes.c_void_p()
        size = ctypes.c_size_t(nbytes)
        assert self._driver.cuMemCreate(ctypes.byref(handle), size, None, ctypes.c_uint64(0)) == 0
        return handle

    def give_back(self, handle: ctypes.c_void_p) -> None:
        """End that use."""
        assert self._driver.cuMemRelease(handle) == 0

    def _allocated(self, nbytes: int) -> int:
        if self._mode == "preload":
            address = ctypes.c_void_p()
            malloc = ctypes.CDLL(None).cudaMalloc  # the preloaded one stands in front
            assert malloc(ctypes.byref(address), ctypes.c_size_t(nbytes)) == 0
            assert address.value is not None
            return address.value
        malloc = self.saver._impl._binary_wrapper.cdll.tms_torch_malloc
        malloc.restype = ctypes.c_void_p
        return int(malloc(ctypes.c_ssize_t(nbytes), 0, None))


def _compile(library: Path, *arguments: str) -> None:
    name = f"-Wl,-soname,{library.name}"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), name, *arguments]
    subprocess.run(command, check=True)
