"""A long prompt in a cgroup: the kernel kills what takes more, and the gate keeps engines alive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.besieged import besieged
from tests.support.chaos import scored
from tests.support.engines import IN_MEMORY, Engine, engine_parameters, engines_here
from tests.support.gate_models import QUICK
from tests.support.memory_cgroup import MemoryCgroup, memory_cgroup

LONG = 2048
REAL = [engine for engine in engines_here() if engine is not IN_MEMORY]


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    """A cgroup of this test's own."""
    with memory_cgroup(f"engine-plugins-{os.getpid()}") as made:
        if made is None:
            pytest.skip("no cgroup can be made here: it takes a writable memory controller")
        yield made


@pytest.mark.parametrize("engine", engine_parameters(REAL))
def test_in_a_cgroup_the_gate_is_life_or_death(
    engine: Engine, group: MemoryCgroup, tmp_path: Path
) -> None:
    """With it 2,048 tokens with all their logits are answered; without it the kernel kills."""
    with besieged(engine, tmp_path, mode="enforce", model=QUICK) as siege:
        # vLLM compiles a function for its first one, in processes that would be in the group too.
        scored(siege.server, siege.prompt(64)).raise_for_status()
        siege.move_to(group)
        siege.wait_until_seen()
        assert scored(siege.server, siege.prompt(LONG)).status_code == 200
        assert siege.lives()
        siege.configure(mode="off")
        with contextlib.suppress(httpx.TransportError):
            assert scored(siege.server, siege.prompt(LONG, 1)).status_code != 200
        with contextlib.suppress(httpx.TransportError):
            assert not siege.lives()
