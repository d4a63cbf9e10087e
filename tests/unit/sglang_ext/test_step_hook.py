"""Which errors of a step say that memory ended."""

from __future__ import annotations

import pytest
import torch

from sglang_ext.step_hook import is_out_of_memory


def test_of_torchs_allocator() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 60)
    assert is_out_of_memory(host.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_of_python_and_cpp() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))


def test_other_errors_are_not() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
