"""A long prompt in a cgroup: the kernel kills what takes more, and the gate keeps engines alive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import httpx
import pytest

from tests.support.besieged import LONG, Sieged
from tests.support.chaos import scored
from tests.support.memory_cgroup import MemoryCgroup, memory_cgroup


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    """A cgroup of this test's own."""
    with memory_cgroup(f"engine-plugins-{os.getpid()}") as made:
        if made is None:
            pytest.skip("no cgroup can be made here: it takes a writable memory controller")
        yield made


def test_in_a_cgroup_the_gate_is_life_or_death(sieged: Sieged, group: MemoryCgroup) -> None:
    """With it 2,048 tokens with all their logits are answered; without it the kernel kills."""
    siege = sieged.siege
    siege.unlimit_addresses()
    siege.configure(mode="enforce", cap_bytes=None)
    siege.move_to(group)
    siege.wait_until_seen()
    assert scored(siege.server, siege.prompt(LONG, 80)).status_code == 200
    assert siege.lives()
    siege.configure(mode="off")
    with contextlib.suppress(httpx.TransportError):
        assert scored(siege.server, siege.prompt(LONG, 81)).status_code != 200
    with contextlib.suppress(httpx.TransportError):
        assert not siege.lives()
