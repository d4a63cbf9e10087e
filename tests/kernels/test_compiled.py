"""What ships compiles for four generations of GPUs without spilling a register."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.compiled import Usage, compiled
from tests.kernels.launches import LAUNCHES

CAPABILITIES = (89, 90, 100, 120)


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_register_is_spilled(name: str, record_property: Callable[[str, object], None]) -> None:
    """STACK 0 by the bundled cuobjdump; what a thread takes is printed, and put into reports."""
    usage = {capability: compiled(LAUNCHES[name](), capability) for capability in CAPABILITIES}
    registers = {f"sm_{capability}": each.registers for capability, each in usage.items()}
    record_property("registers", registers)
    print(f"{name}: registers {registers}")
    assert {each.stack_bytes for each in usage.values()} == {0}
    assert all("fma.rn.f32" not in each.ptx for each in usage.values())
    check_conversion(name, usage)


def check_conversion(name: str, usage: dict[int, Usage]) -> None:
    """Weights are read 16 bytes at a time and rounded by the hardware, where their rows allow."""
    for each in usage.values():
        if name.startswith("quantize"):
            assert "cvt.rn.satfinite.e4m3x2.f32" in each.ptx
        if "1000 columns" not in name:
            assert "ld.global.v4.b32" in each.ptx or "ld.global.v2.b64" in each.ptx
