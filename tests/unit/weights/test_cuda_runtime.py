"""Which libcudart is found, in processes where a stub of the same functions is loaded as well."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

import pytest
import torch

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.hardware.cuda_runtime import (
    CudaRuntime,
    address_of,
    file_of,
    gpu_pci_address,
    torch_cuda_runtime,
)
from tests.support.after_import import Environ, run_after_import
from tests.support.fake_cuda import build_cudart, build_user

NO_CUDA_BUILD = pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch brings a CUDA runtime of its own"
)
LIBRARY = tuple[str, bool]
"""A path, and whether it is loaded for everybody."""


def look_up(order: list[LIBRARY], user: str) -> dict[str, object]:
    """Load libraries in an order, then say whose cudaMalloc each look-up ends in."""
    logging.basicConfig(stream=sys.stderr)
    for path, everywhere in order:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL if everywhere else ctypes.RTLD_LOCAL)
    runtime = CudaRuntime(Path(user))
    visible = runtime.make_visible()
    return {
        "path": runtime.path,
        "visible": visible,
        "everywhere": file_of(address_of(ctypes.CDLL(None).cudaMalloc)),
        "bound": file_of(runtime.address("cudaMalloc")),
    }


class Libraries:
    """The runtime that torch is linked against, and a stub in another package's folder."""

    def __init__(self, folder: Path) -> None:
        self.real = str(build_cudart(folder / "nvidia"))
        self.stub = str(build_cudart(folder / "tilelang", stub=True))
        self.user = build_user(folder, Path(self.real))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    return Libraries(tmp_path_factory.mktemp("cuda"))


@NO_CUDA_BUILD
def test_torchs_runtime_is_found_and_made_visible_beside_a_stub(libraries: Libraries) -> None:
    real, stub = libraries.real, libraries.stub
    orders: list[list[LIBRARY]] = [[(stub, False)], [(real, True), (stub, True)], [(stub, True)]]
    cases: list[tuple[Environ, tuple[list[LIBRARY], str]]]
    cases = [({}, (order, str(libraries.user))) for order in orders]
    private, later, first = run_after_import(look_up, cases)

    # Loaded privately by its package; or for everybody, but after torch.
    for seen, said in (private, later):
        assert seen == {"path": real, "visible": True, "everywhere": real, "bound": real}
        assert "WARNING" not in said

    # For everybody and first: the look-up is lost, and named; our own functions go to torch's.
    seen, said = first
    assert seen == {"path": real, "visible": False, "everywhere": stub, "bound": real}
    assert f"WARNING:engine_plugins.weights.hardware.cuda_runtime:{stub} stands before" in said


def test_functions_that_a_runtime_lacks_are_named(libraries: Libraries, tmp_path: Path) -> None:
    """A torch that was bound to a stub, because it was loaded first under the same name."""
    stub = build_cudart(tmp_path, stub=True)
    runtime = CudaRuntime(build_user(tmp_path, stub))
    with pytest.raises(UnsupportedError, match=r"libcudart-\w+\.so\.13 has no cudaSetDevice"):
        runtime.address("cudaSetDevice")


def test_a_library_that_is_absent_or_without_cuda_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"absent\.so"):
        CudaRuntime(tmp_path / "absent.so")
    torchs = Path(torch.__file__).parent / "lib" / "libc10.so"
    with pytest.raises(UnsupportedError, match="no CUDA runtime comes with"):
        CudaRuntime(torchs)


def test_a_devices_address_is_written_as_sysfs_writes_it(
    libraries: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four digits of domain, lower case; CUDA gives eight, or upper case."""
    runtime = CudaRuntime(libraries.user)
    monkeypatch.setattr(
        "engine_plugins.weights.hardware.cuda_runtime.torch_cuda_runtime", lambda: runtime
    )
    assert gpu_pci_address(0) == "0000:1a:00.0"
    assert gpu_pci_address(1) == "0000:2a:00.0"
    with pytest.raises(UnsupportedError, match=r"device 9 .*error 101"):
        gpu_pci_address(9)


@NO_CUDA_BUILD
def test_a_torch_without_cuda_has_no_runtime() -> None:
    with pytest.raises(UnsupportedError, match=r"libc10_cuda\.so"):
        torch_cuda_runtime()
