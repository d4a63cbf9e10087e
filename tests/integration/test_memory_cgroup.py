"""A long prompt in a cgroup: the kernel kills what takes more, and the gate keeps engines alive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.besieged import besieged
from tests.support.chaos import scored
from tests.support.engines import Engine, engines_here
from tests.support.gate_models import QUICK
from tests.support.memory_cgroup import MemoryCgroup, memory_cgroup

pytestmark = pytest.mark.engine

LONG = 2048
ENGINES = [pytest.param(each, id=each.kind) for each in engines_here() if each.kind != "in_memory"]


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    """A cgroup of this test's own."""
    with memory_cgroup(f"engine-plugins-{os.getpid()}") as made:
        if made is None:
            pytest.skip("no cgroup can be made here: it takes a writable memory controller")
        yield made


@pytest.mark.parametrize("mode", ["enforce", "off"])
@pytest.mark.parametrize("engine", ENGINES)
def test_in_a_cgroup_the_gate_is_life_or_death(
    engine: Engine, mode: str, group: MemoryCgroup, tmp_path: Path
) -> None:
    """With it 2,048 tokens with all their logits are answered; without it the kernel kills."""
    with besieged(engine, tmp_path, mode=mode, model=QUICK) as siege:
        # vLLM compiles a function for its first one, in processes that would be in the group too.
        scored(siege.server, siege.prompt(64)).raise_for_status()
        siege.move_to(group)
        if mode == "enforce":
            siege.wait_until_seen()
        try:
            answered = scored(siege.server, siege.prompt(LONG)).status_code == 200
            lives = siege.lives()
        except httpx.TransportError:
            answered = lives = False
        assert (answered, lives) == ((True, True) if mode == "enforce" else (False, False))
