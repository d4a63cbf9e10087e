"""An engine that stops answering in the middle of an update, and what it does when it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from engine_plugins.admin import bounded_control, update_transaction
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors
from tests.support.problems import problem
from tests.support.source_ranks import SourceRank, offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait out every limit."""
    monkeypatch.setattr(update_transaction, "UPDATE_GRACE_S", 0.2)
    monkeypatch.setattr(bounded_control, "STILL_S", 0.1)


@pytest.fixture
def trainer() -> Iterator[SourceRank]:
    with offered_tensors(hf_tensors(seed=1)) as made:
        yield made


@pytest.mark.parametrize(
    ("at", "named"),
    [
        ("start", "start"),
        ("pause keep", "resume"),  # a pause has a deadline of its own, and is then taken back
        ("advance", "advance"),
        ("flush", "flush"),
        ("publish_version", "publish_version"),
    ],
)
async def test_a_frozen_engine_is_fenced_in_time_and_mended_by_a_good_update(
    make_server: MakeServer, trainer: SourceRank, at: str, named: str
) -> None:
    """Whoever waits is told, requests are refused, and what comes late publishes nothing."""
    server = make_server(tp_size=2)
    async with server.running():
        plan = await server.plan(trainer.manifest)
        held = server.engine.submit(1, 2, 3)
        server.engine.freeze_at = at
        asked = time.monotonic()
        told = await server.post("/weights/update", plan_id=plan, version=7, timeout_s=0.5)
        assert time.monotonic() - asked < 0.5 + 5
        detail = problem(told, 504, "engine_stuck")
        assert f"did not answer {named}" in detail
        state = await server.state()
        assert (state["state"], state["fence"]["code"]) == ("fenced", "engine_stuck")
        assert "version 7" in state["fence"]["detail"]
        fence = server.shared.read().fence
        assert fence is not None
        assert not fence.for_good
        assert state["update"] is None
        assert not held.ended.is_set(), "it has not been told yet"

        server.engine.go_on()
        await asyncio.wait_for(held.ended.wait(), 10)
        assert held.finish_reason == "error"
        await asyncio.sleep(0.3)
        late = await server.state()
        assert (late["state"], late["weights"]["version"]) == ("fenced", None)
        history = (await server.get("/weights")).json()["history"]
        assert [each["outcome"] for each in history] == ["failed"]

        done = await server.post("/weights/update", plan_id=plan, version=8)
        assert done.status_code == 200, done.text
        state = await server.state()
        assert (state["state"], state["fence"], state["weights"]["version"]) == ("serving", None, 8)
        assert server.engine.serves(seed=1)
        assert len(await server.engine.answer(4, 5, 6)) == 2


async def test_an_engine_that_is_frozen_already_is_fenced_by_the_update_that_finds_it_so(
    make_server: MakeServer, trainer: SourceRank
) -> None:
    """It still has its weights: nothing of them was touched."""
    server = make_server()
    async with server.running():
        plan = await server.plan(trainer.manifest)
        installed = await server.post("/weights/update", plan_id=plan, version=1)
        assert installed.status_code == 200, installed.text
        server.engine.freeze_at = "staging_room"
        told = await server.post("/weights/update", plan_id=plan, version=2, timeout_s=0.5)
        assert "staging_room" in problem(told, 504, "engine_stuck")
        state = await server.state()
        assert (state["state"], state["weights"]["version"]) == ("fenced", 1)
        server.engine.go_on()
        done = await server.post("/weights/update", plan_id=plan, version=2)
        assert done.status_code == 200, done.text
