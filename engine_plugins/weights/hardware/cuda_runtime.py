"""The CUDA runtime that torch itself uses, whatever else was loaded under its name.

Other packages ship stubs of libcudart (TileLang's forwards to whichever library the process-wide
symbol look-up finds first, and aborts where that is itself).
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

from engine_plugins.errors import UnsupportedError

__all__ = ["CudaRuntime", "address_of", "file_of", "gpu_pci_address", "torch_cuda_runtime"]

logger = logging.getLogger(__name__)

_PCI_ADDRESS_BYTES = 32
_BINDS_CUDART = "libc10_cuda.so"


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


class CudaRuntime:
    """One libcudart, by file.

    Args:
        user: a library that is linked against the libcudart that is meant.

    Raises:
        UnsupportedError: the library is not there, or no libcudart comes with it.
    """

    def __init__(self, user: Path) -> None:
        try:
            linked = ctypes.CDLL(str(user))
            self.path = file_of(address_of(linked.cudaMalloc))
            self._library = ctypes.CDLL(self.path)
        except (OSError, AttributeError) as error:
            raise UnsupportedError(
                f"no CUDA runtime comes with {user}: {error}",
                remedy="install a CUDA build of torch, or keep to host memory",
            ) from error

    def function(self, name: str) -> ctypes._NamedFuncPointer:
        """A function of this libcudart, and of no other.

        Raises:
            UnsupportedError: it has none of this name.
        """
        try:
            found: ctypes._NamedFuncPointer = getattr(self._library, name)
        except AttributeError as error:
            raise UnsupportedError(
                f"{self.path} has no {name}: it is a stub, or not a CUDA runtime",
                remedy="see which package loads a libcudart of its own before torch is imported",
            ) from error
        return found

    def address(self, name: str) -> int:
        """Where a function lies; raises as `function`."""
        return address_of(self.function(name))

    def make_visible(self) -> bool:
        """Let the process-wide symbol look-up find this libcudart.

        Returns:
            Whether it does. It does not where another was made visible before, which a warning
            names; nothing can come before that one any more.
        """
        ctypes.CDLL(self.path, mode=ctypes.RTLD_GLOBAL)
        winner = file_of(address_of(ctypes.CDLL(None).cudaMalloc))
        if os.path.samefile(winner, self.path):
            return True
        logger.warning(
            "%s stands before torch's own CUDA runtime, %s, in the process-wide symbol look-up; "
            "what relies on that may fail or abort. Import torch before the package that loads it",
            winner,
            self.path,
        )
        return False


@cache
def torch_cuda_runtime() -> CudaRuntime:
    """The libcudart of the torch in this process.

    Raises:
        UnsupportedError: this torch is no CUDA build.
    """
    return CudaRuntime(Path(torch.__file__).parent / "lib" / _BINDS_CUDART)


def gpu_pci_address(device_index: int) -> str:
    """PCI address of a CUDA device of this process, as sysfs writes it (`0000:18:00.0`).

    Raises:
        UnsupportedError: this torch is no CUDA build, or has no such device.
    """
    text = ctypes.create_string_buffer(_PCI_ADDRESS_BYTES)
    ask = torch_cuda_runtime().function("cudaDeviceGetPCIBusId")
    code = ask(text, ctypes.c_int(len(text)), ctypes.c_int(device_index))
    if code:
        raise UnsupportedError(
            f"CUDA does not know where device {device_index} is (error {code})",
            remedy="give a device from 0 below torch.cuda.device_count(), or name the ports to "
            "use in ENGINE_PLUGINS_NET_DEVICES",
        )
    domain, _, rest = text.value.decode().lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def address_of(function: ctypes._NamedFuncPointer) -> int:
    """Where a loaded function lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def file_of(address: int) -> str:
    """The file whose code lies at an address.

    Raises:
        OSError: none does.
    """
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise OSError(f"no loaded file has code at {address:#x}")
    return os.fsdecode(info.dli_fname)
