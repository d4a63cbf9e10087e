"""What a rank may hold: from the kernel's figures, or configured within them."""

from __future__ import annotations

import mmap
import subprocess
import sys
from dataclasses import replace

import pytest

from engine_plugins.errors import SettingsError
from engine_plugins.prefill_gate.memory_cap import (
    HostFigures,
    MemoryCap,
    MemoryFigures,
    Reading,
    device_cap,
    read_host,
    resolve_cap,
)

GIB = 1 << 30
FIGURES = HostFigures(resident=2 * GIB, machine_total=64 * GIB, machine_available=40 * GIB)


def test_by_default_it_is_what_is_held_and_what_is_free() -> None:
    """Ranks on one machine share what is free."""
    cap = resolve_cap(None, FIGURES)
    assert (cap.resident_bytes, cap.address_space_bytes) == (42 * GIB, None)
    assert "machine" in cap.reason
    assert resolve_cap(None, FIGURES, ranks=2).resident_bytes == 22 * GIB


def test_a_cgroup_with_less_room_is_the_limit() -> None:
    """Also where nothing is left in it."""
    tight = replace(FIGURES, cgroup_limit=8 * GIB, cgroup_used=5 * GIB)
    cap = resolve_cap(None, tight)
    assert cap.resident_bytes == 5 * GIB
    assert "cgroup" in cap.reason
    assert resolve_cap(None, replace(tight, cgroup_used=9 * GIB)).resident_bytes == 2 * GIB


def test_a_limit_of_addresses_is_kept_beside_it() -> None:
    """Both hold."""
    limited = replace(FIGURES, address_space_limit=10 * GIB)
    assert resolve_cap(None, limited).address_space_bytes == 10 * GIB
    assert resolve_cap(5 * GIB, limited) == MemoryCap(
        resident_bytes=5 * GIB,
        address_space_bytes=10 * GIB,
        reason="ENGINE_PLUGINS_PREFILL_CAP_BYTES",
    )


@pytest.mark.parametrize(
    ("configured", "figures", "named"),
    [
        (65 * GIB, FIGURES, "machine"),
        (9 * GIB, replace(FIGURES, cgroup_limit=8 * GIB), "cgroup"),
        (9 * GIB, replace(FIGURES, address_space_limit=8 * GIB), "RLIMIT_AS"),
    ],
)
def test_a_cap_above_what_there_is_is_refused_at_the_start(
    configured: int, figures: HostFigures, named: str
) -> None:
    """It would let in what kills the engine."""
    with pytest.raises(SettingsError, match=f"PREFILL_CAP_BYTES is .*{named}"):
        resolve_cap(configured, figures)


def test_a_gpus_cap_is_what_is_held_and_free_of_it() -> None:
    """By this rank and by nobody."""
    assert device_cap(free=10, ours=60).resident_bytes == 70


def test_this_process_is_read() -> None:
    """128 MiB that are touched show in what is resident and in what is addressed."""
    figures = HostFigures.now()
    assert 0 < figures.resident < figures.machine_total
    cap = resolve_cap(None, figures)
    before = read_host(cap).reading(None)
    memory = mmap.mmap(-1, 128 << 20)
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1
    after = read_host(cap).reading(None)
    memory.close()
    grown = after.used_bytes - before.used_bytes
    assert 120 << 20 < grown < 160 << 20
    assert before.headroom_bytes - after.headroom_bytes == grown


def test_the_tighter_of_two_caps_is_read() -> None:
    """A process that reserves addresses hits that limit first."""
    roomy = 1 << 50
    resident = read_host(
        MemoryCap(resident_bytes=GIB, address_space_bytes=roomy, reason="")
    ).reading(None)
    addresses = read_host(
        MemoryCap(resident_bytes=roomy, address_space_bytes=GIB, reason="")
    ).reading(None)
    assert resident.cap_bytes == addresses.cap_bytes == GIB
    assert addresses.used_bytes > resident.used_bytes
    assert Reading(5, 3).headroom_bytes == -2


def test_what_is_left_is_what_can_be_had_whatever_cap_was_configured() -> None:
    """Of free memory and of addresses."""
    figures = MemoryFigures(used_bytes=60, cap_bytes=100, addresses=500, address_limit=530)
    assert figures.reading(None) == Reading(500, 530, 30)
    assert figures.reading(70) == Reading(60, 70, 30)
    assert MemoryFigures(used_bytes=60, cap_bytes=100).reading(50) == Reading(60, 50, 40)


def test_a_limit_that_the_process_was_started_under_is_found() -> None:
    """As an operator would set it: `ulimit -v`."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36));"
        "from engine_plugins.prefill_gate.memory_cap import HostFigures;"
        "raise SystemExit(HostFigures.now().address_space_limit != 1 << 36)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
