"""When an engine offers its weights to peers, and when it says why it does not."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from engine_plugins.admin.state import Fence, moved
from engine_plugins.weights.contract.manifest import decode_manifest
from tests.support.admin_server import AdminServer
from tests.support.in_memory_model import hf_tensors, pack_norms
from tests.support.problems import problem
from tests.support.source_ranks import offered_tensors

pytestmark = pytest.mark.anyio

MakeServer = Callable[..., AdminServer]


async def test_an_engine_offers_what_an_update_has_installed(make_server: MakeServer) -> None:
    """A manifest for each rank, and which update they are of; also while it is paused."""
    server = make_server(tp_size=2, direct_landing=True)
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        async with server.running():
            refused = await server.get("/weights/manifest")
            said = problem(refused, 409, "illegal_state")
            assert "the weights that it was started with" in said
            plan = await server.plan(trainer.manifest)
            await server.post("/weights/update", plan_id=plan, version=3, request_id="r3")
            await server.post("/pause")
            answer = await server.get("/weights/manifest")
    assert answer.status_code == 200, answer.text
    offer = answer.json()
    assert (offer["version"], offer["request_id"]) == (3, "r3")
    manifests = [
        decode_manifest(base64.b64decode(each), max_entries=1000) for each in offer["manifests"]
    ]
    assert [each.global_rank for each in manifests] == [0, 1]
    assert [each.model for each in manifests] == [server.engine.info.model_facts] * 2


async def test_a_rank_that_cannot_is_named(make_server: MakeServer) -> None:
    """With the module whose live parameter is not as its loader copies it."""
    server = make_server()
    (rank,) = server.engine.ranks
    pack_norms(rank.installer.model)
    with offered_tensors(hf_tensors(seed=1)) as trainer:
        async with server.running():
            plan = await server.plan(trainer.manifest)
            await server.post("/weights/update", plan_id=plan, version=3)
            refused = await server.get("/weights/manifest")
    assert "norm: norm.weight holds other values" in problem(refused, 409, "illegal_state")


async def test_a_fenced_engine_offers_nothing(make_server: MakeServer) -> None:
    server = make_server()
    fence = Fence(code="peer_lost", detail="half", remedy="repeat", attempted_version=5)
    async with server.running():
        server.shared.change(lambda state: moved(state, "fenced", fence=fence))
        refused = await server.get("/weights/manifest")
    assert "while fenced" in problem(refused, 409, "illegal_state")
