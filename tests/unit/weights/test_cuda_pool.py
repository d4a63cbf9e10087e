"""The pool's two C functions, built as users build them, on a fake CUDA runtime.

What needs a GPU is in tests/gpu.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from engine_plugins.errors import UnsupportedError
from engine_plugins.weights.hardware.cuda_pool import PlainCudaPool, load_plain_cuda
from engine_plugins.weights.hardware.cuda_runtime import CudaRuntime
from tests.support.fake_cuda import build_cudart, build_user


class Built:
    """The functions, and the counters of the runtime under them."""

    def __init__(self, folder: Path) -> None:
        cudart = build_cudart(folder / "nvidia")
        self.runtime = CudaRuntime(build_user(folder, cudart))
        self.library, self.path = load_plain_cuda(self.runtime)
        self._fake = ctypes.CDLL(str(cudart))
        self.library.plain_cuda_alloc.restype = ctypes.c_void_p
        self.library.plain_cuda_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self.library.plain_cuda_free.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        ]

    def counter(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._fake, f"fake_{name}").value

    def reset(self, name: str) -> None:
        ctypes.c_int.in_dll(self._fake, f"fake_{name}").value = 0


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def built(built_once: Built) -> Built:
    """With its counters at zero."""
    for name in ("mallocs", "frees", "errors_taken"):
        built_once.reset(name)
    return built_once


def test_memory_comes_from_cuda_malloc_on_the_device_that_was_asked_for(built: Built) -> None:
    """And the thread's current device is what it was."""
    memory = built.library.plain_cuda_alloc(4096, 1, None)
    ctypes.memset(memory, 7, 4096)
    assert (built.counter("mallocs"), built.counter("last_device")) == (1, 1)
    assert built.counter("device") == 0
    built.library.plain_cuda_free(memory, 4096, 1, None)
    assert built.counter("frees") == 1


def test_no_memory_is_a_null_and_leaves_no_error_behind(built: Built) -> None:
    """Torch makes its own error of it, after it has freed what it holds and asked again."""
    assert built.library.plain_cuda_alloc(2 << 20, 1, None) is None
    assert (built.counter("mallocs"), built.counter("errors_taken")) == (0, 1)
    assert built.counter("device") == 0


def test_a_device_that_is_not_there_is_a_null(built: Built) -> None:
    assert built.library.plain_cuda_alloc(4096, 9, None) is None
    assert (built.counter("mallocs"), built.counter("errors_taken")) == (0, 1)


def test_its_path_opens_it_again_with_nothing_left_on_disk(built: Built) -> None:
    """Torch opens the path a second time and must get the same, bound, library."""
    assert not built.path.parent.exists()
    again = ctypes.CDLL(str(built.path))
    assert again._handle == built.library._handle


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler", "cc --no-such-option"])
def test_a_compiler_that_fails_is_named(
    built: Built, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(UnsupportedError, match=f"{compiler}.* failed") as info:
        load_plain_cuda(built.runtime)
    assert "CC" in info.value.remedy


def test_a_machine_without_a_compiler_is_told(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"no C compiler.*cc, gcc, clang"):
        load_plain_cuda(built.runtime)


def test_a_runtime_that_is_a_stub_is_refused(tmp_path: Path) -> None:
    stub = build_cudart(tmp_path, stub=True)
    with pytest.raises(UnsupportedError, match="has no cudaGetDevice"):
        load_plain_cuda(CudaRuntime(build_user(tmp_path, stub)))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_without_cuda_there_is_no_pool() -> None:
    with pytest.raises(UnsupportedError, match="CUDA"):
        PlainCudaPool(torch.device("cuda:0"))
