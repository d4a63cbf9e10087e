"""What travels to workers of this host, and to those of others."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from engine_plugins.admin.worker_calls import WorkerCalls
from engine_plugins.weights.contract.report import RankPlan
from engine_plugins.weights.receiving.worker_messages import ConnectAnswer, WorkerDescription
from tests.support.in_memory_engine import InMemoryEngine

pytestmark = pytest.mark.anyio


class _Elsewhere(InMemoryEngine):
    """An engine whose workers say where they are, and keep what they are told."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__(tp_size=len(hosts), generation=lambda: None)
        self.told: list[object] = []
        self._hosts = hosts

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        if call == "describe":
            return [
                _answer(WorkerDescription(tp_rank=rank, pid=1, host=host))
                for rank, host in enumerate(self._hosts)
            ]
        self.told += msgspec.msgpack.decode(arguments)["manifests"]
        return [_answer(_connected(rank)) for rank in range(len(self._hosts))]


@pytest.mark.parametrize(
    ("hosts", "travels"),
    [
        ([socket.gethostname()], "path"),
        ([socket.gethostname(), "another-host"], "bytes"),
    ],
)
async def test_manifests_travel_as_paths_within_a_host(
    tmp_path: Path, hosts: list[str], travels: str
) -> None:
    """One worker elsewhere is enough: a call is the same for all of them."""
    path = tmp_path / "manifest"
    path.write_bytes(b"a manifest")
    engine = _Elsewhere(hosts)
    answers = await WorkerCalls(engine).connect("p", [path], direction="pull")
    assert [answer.plan.tp_rank for answer in answers] == list(range(len(hosts)))
    assert engine.told == [str(path) if travels == "path" else b"a manifest"]


def _connected(rank: int) -> ConnectAnswer:
    numbers = dict.fromkeys(
        [field.name for field in msgspec.structs.fields(RankPlan) if field.type is int], 0
    )
    plan = msgspec.convert(numbers | {"tp_rank": rank}, RankPlan)
    return ConnectAnswer(plan=plan, unused=[], plan_s=0.0, connect_s=0.0)


def _answer(value: object) -> bytes:
    return msgspec.msgpack.encode({"value": value, "failure": None})
