"""Servers under siege, which the tests of the prefill gate share: each starts once in a run.

The files that use them run in their order. The last test of `test_prefill_gate.py` kills the one
that cannot cut prompts, the last of `test_prefill_gate_in_a_cgroup.py` the other one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.besieged import LONG, Siege, Sieged, besieged, measured_line
from tests.support.chaos import scored
from tests.support.engines import Engine, engine_parameters, real_engines_here
from tests.support.gate_models import QUICK, save_tokenizer

UNCUT = {
    "vllm": ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
    "sglang": ("--chunked-prefill-size", "-1"),
}


@pytest.fixture(
    scope="package",
    params=engine_parameters(real_engines_here()),
)
def real_engine(request: pytest.FixtureRequest) -> Engine:
    """Every real engine of this environment."""
    return request.param


@pytest.fixture(scope="package")
def sieged(real_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sieged]:
    """A calibrated server that has too little room for a long prompt with all its logits."""
    with besieged(
        real_engine, tmp_path_factory.mktemp("siege"), mode="observe", model=QUICK
    ) as siege:
        siege.calibrate()
        needs = measured_line(siege.gate())
        siege.configure(mode="off")
        answer = scored(siege.server, siege.prompt(LONG, 7), 4).json()
        siege.server.admin.post("/flush").raise_for_status()
        siege.configure(mode="observe")
        siege.limit_addresses()
        siege.wait_until_seen()
        yield Sieged(siege, answer, needs)


@pytest.fixture
def siege(sieged: Sieged) -> Iterator[Siege]:
    """The gate is in force; the engine lives when the test has ended."""
    siege = sieged.siege
    siege.configure(mode="enforce", cap_bytes=None)
    yield siege
    siege.configure(mode="enforce", cap_bytes=None)
    assert siege.lives(), siege.server.log_tail()


@pytest.fixture(scope="package")
def uncut(real_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """A server that cannot cut prompts, and takes words."""
    folder = tmp_path_factory.mktemp("uncut")
    tokenizer = save_tokenizer(folder / "tokenizer", QUICK)
    talking = replace(real_engine, serve=functools.partial(real_engine.serve, tokenizer=tokenizer))
    arguments = UNCUT[real_engine.kind]
    with besieged(talking, folder, mode="enforce", model=QUICK, arguments=arguments) as siege:
        yield siege
