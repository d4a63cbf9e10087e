"""The stand-ins with which the tests run a real SGLang on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.sglang_shims import sgl_kernel

pytestmark = pytest.mark.loader

SHIMS = Path(__file__).resolve().parents[1] / "support" / "sglang_shims"


@pytest.mark.parametrize(
    ("targets", "sources"),
    [([0, 4], [3, 1]), ([2, 3, 4], [1, 2, 3]), ([], [])],
    ids=["apart", "overlapping", "none"],
)
def test_kv_rows_are_copied_in_every_buffer(targets: list[int], sources: list[int]) -> None:
    """Rows are read before any is written, and the rest of a buffer stays as it was."""
    buffers = [torch.randn(6, 3, 5), torch.randn(6, 7)]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, copy in zip(expected, buffers, strict=True):
        buffer[targets] = copy[sources]
    sgl_kernel.copy_all_layer_kv_cache_cpu(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64),
        torch.tensor([buffer[0].nbytes for buffer in buffers]),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(sources, dtype=torch.int64),
    )
    assert all(map(torch.equal, buffers, expected))


def test_another_kernel_can_be_imported_and_says_what_it_is_when_called() -> None:
    from tests.support.sglang_shims.sgl_kernel import rmsnorm

    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm is a compiled kernel"):
        rmsnorm(1, eps=2)


def test_dunder_names_are_not_kernels() -> None:
    assert not hasattr(sgl_kernel, "__version__")


ONLY_SGLANG = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang's environment only"
)


@ONLY_SGLANG
@pytest.mark.filterwarnings("ignore::UserWarning")  # of SGLang's import, without a GPU
def test_sglang_packs_nothing_for_amx_whatever_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels for that are in the real package; so results are the same on every CPU."""
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "is_amx_tile_supported", True)
    assert not common.cpu_has_amx_support()


@ONLY_SGLANG
def test_torchvision_is_imported_when_the_shims_are_on_the_path() -> None:
    """And a process that needs none of it does not import PyTorch for it."""
    assert str(SHIMS) in sys.path
    importlib.import_module("torchvision")
    subprocess.run(
        [sys.executable, "-c", "import sys; assert 'torch' not in sys.modules"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(SHIMS)},
        timeout=120,
    )
