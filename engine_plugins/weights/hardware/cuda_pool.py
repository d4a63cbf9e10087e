"""CUDA memory on plain cudaMalloc, whatever torch's allocator is set to."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine_plugins.errors import TransportError, UnsupportedError
from engine_plugins.weights.hardware.cuda_runtime import CudaRuntime, torch_cuda_runtime
from engine_plugins.weights.hardware.expandable_segments import expandable_ranges

__all__ = ["PlainCudaPool", "load_plain_cuda"]

_SOURCE = Path(__file__).with_name("plain_cuda.c")
_BOUND = ("cudaMalloc", "cudaFree", "cudaGetDevice", "cudaSetDevice", "cudaGetLastError")
_COMPILERS = ("cc", "gcc", "clang")


class PlainCudaPool:
    """A pool of torch's caching allocator whose segments come from cudaMalloc.

    Made by the first use in a process: a C compiler (`CC`, else cc, gcc or clang) builds the
    allocator's two functions.

    Args:
        device: a CUDA device.

    Raises:
        UnsupportedError: no CUDA build of torch, or no C compiler.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._proved = False
        allocator = _allocator()
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.MemPool(allocator.allocator())

    @contextmanager
    def active(self) -> Iterator[None]:
        """What this thread allocates on the pool's device within comes from the pool.

        Raises:
            TransportError: the pool is closed.
        """
        if self._pool is None:
            raise TransportError("this pool of CUDA memory is closed", remedy="make a new pool")
        with torch.cuda.use_mem_pool(self._pool, device=self._device):
            yield

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the pool, with undefined contents.

        Raises:
            TransportError: the pool is closed.
            UnsupportedError: this torch gives pools expandable segments as well, or none.
            torch.OutOfMemoryError: the device has no memory left.
        """
        try:
            with self.active():
                tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        except RuntimeError as error:
            if "expandable_segments" not in str(error):
                raise
            raise _refused(str(error)) from error
        if not self._proved and tensor.numel():
            if any(tensor.data_ptr() in each for each in expandable_ranges()):
                raise _refused("it gave memory of expandable segments")
            self._proved = True
        return tensor

    def close(self) -> None:
        """Give the memory back to the device, that of tensors still held when they go."""
        self._pool = None


def load_plain_cuda(runtime: CudaRuntime) -> tuple[ctypes.CDLL, Path]:
    """Compile and load the allocator's functions, bound to a CUDA runtime.

    Returns:
        The library, and its path, which opens it again but is no file any more.

    Raises:
        UnsupportedError: no C compiler, it failed, or the runtime lacks a function.
    """
    addresses = [ctypes.c_void_p(runtime.address(name)) for name in _BOUND]
    with tempfile.TemporaryDirectory(prefix="engine-plugins-") as folder:
        path = Path(folder, "plain_cuda.so")
        _compile(path)
        library = ctypes.CDLL(str(path))
    library.plain_cuda_bind(*addresses)
    return library, path


@cache
def _allocator() -> torch.cuda.memory.CUDAPluggableAllocator:
    runtime = torch_cuda_runtime()
    runtime.make_visible()
    _, path = load_plain_cuda(runtime)
    allocator = torch.cuda.memory.CUDAPluggableAllocator(
        str(path), "plain_cuda_alloc", "plain_cuda_free"
    )
    # torch's pools hold a bare pointer to it, and may outlive every Python object at exit.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(allocator))
    return allocator


def _compile(library: Path) -> None:
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for path in map(shutil.which, _COMPILERS) if path), None)
    compiler = named or ([found] if found else [])
    if not compiler:
        raise UnsupportedError(
            f"no C compiler for the pool on plain cudaMalloc: none of {', '.join(_COMPILERS)} is "
            "on the path",
            remedy="install one, name it in CC, or turn expandable segments off",
        )
    command = [*compiler, "-O2", "-shared", "-fPIC", "-nostdlib", "-o", str(library), str(_SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise UnsupportedError(
            f"{shlex.join(command)} failed: {said}",
            remedy="name a C compiler in CC, or turn expandable segments off",
        ) from error


def _refused(seen: str) -> UnsupportedError:
    return UnsupportedError(
        f"torch {torch.__version__} has no pool on plain cudaMalloc while expandable segments are "
        f"on: {seen}",
        remedy="use a newer torch, or turn expandable segments off",
    )
