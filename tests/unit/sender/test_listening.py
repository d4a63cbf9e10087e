"""Where a trainer's own agent listens: on the networks of its engines. Real NIXL, real sockets."""

from __future__ import annotations

import os
import socket

import psutil
import pytest
import torch

from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from tests.support.fake_engine import TOKEN, FakeEngine


@pytest.fixture(autouse=True)
def without_an_operators_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UCX_NET_DEVICES", "ENGINE_PLUGINS_NET_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def listening() -> set[tuple[str, int]]:
    mine = psutil.Process().net_connections(kind="tcp")
    return {each.laddr for each in mine if each.status == psutil.CONN_LISTEN}


def outside() -> str:
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return str(each.address)
    pytest.skip("this machine has loopback alone")


def test_it_is_the_network_of_the_engines_and_grows_with_them(
    engine: FakeEngine, model: torch.nn.Module
) -> None:
    """An engine of another network, which joins later, finds an agent that it can reach."""
    engine.pulls = False
    before = listening()
    with WeightSender.from_hf(model, engines=engine.url, token=TOKEN) as sender:
        opened = {address for address, _ in listening() - before}
        assert opened == {"127.0.0.1"}
        sender.update(1)
        assert {address for address, _ in listening() - before} == opened
        with socket.create_server((outside(), 0)) as reserved:
            port = reserved.getsockname()[1]
        sender.add_engines(f"http://{outside()}:{port}")
        with pytest.raises(EnginesFailedError, match="1 of 2 engines"):
            sender.update(2)
        assert {address for address, _ in listening() - before} == {"127.0.0.1", outside()}
        assert engine.version == 2
        assert len({manifest.agent for manifest in engine.sources.values()}) == 2
    assert listening() <= before
    assert "UCX_NET_DEVICES" not in os.environ


def test_slots_are_filled_for_an_agent_that_was_made_anew(
    engine: FakeEngine, model: torch.nn.Module
) -> None:
    """What lets go of the memory within an update must not let go of what was filled for it."""
    engine.pulls = False
    weights = dict(model.named_parameters())
    engine.wants = dict.fromkeys(weights, "bfloat16")
    with WeightSender.from_hf(model, engines=engine.url, token=TOKEN) as sender:
        sender.update(1)
        with socket.create_server((outside(), 0)) as reserved:
            port = reserved.getsockname()[1]
        sender.add_engines(f"http://{outside()}:{port}")
        with pytest.raises(EnginesFailedError, match="1 of 2 engines"):
            sender.update(2)
        assert len({manifest.agent for manifest in engine.sources.values()}) == 2
        placed = {each.box.name: each.memory for each in sender._job.offer.source._placed}
        for name, weight in weights.items():
            assert torch.equal(placed[name], weight.bfloat16()), name
