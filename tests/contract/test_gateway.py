"""What stands before an engine answers for it, and the trainer writes as soon as it may.

The weights that answer afterwards are one version's, whoever was told what.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch

from engine_plugins.sender import known_end
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from tests.support.bad_gateway import BadGateway, bad_gateway
from tests.support.configurations import DENSE, DENSE_TP2, NEW, OLD, on
from tests.support.engine_server import TOKEN
from tests.support.served import TCP, Served
from tests.support.stepping import Steps
from tests.support.waiting import until

HALF_WAY = 12
LATE = ("/weights/update", "/state", "/weights")


@pytest.fixture
def gateway(served: Served) -> Iterator[BadGateway]:
    served.restore(OLD)
    with bad_gateway(served.server.url) as made:
        yield made
    served.restore(OLD)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """The new weights, in memory that the trainer will write to."""
    return {name: tensor.clone() for name, tensor in NEW.tensors().items()}


@pytest.fixture
def sender(
    gateway: BadGateway, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[WeightSender]:
    for name, value in TCP.items():
        monkeypatch.setenv(name, value)
    with WeightSender.from_hf(
        tensors, engines=gateway.url, token=TOKEN, config=NEW.config()
    ) as made:
        yield made


def ruin(tensors: dict[str, torch.Tensor]) -> None:
    """The trainer's next step, of weights that nobody would mistake for others."""
    for tensor in tensors.values():
        tensor.fill_(0.25)


@on(DENSE)
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_504_ends_no_update(
    served: Served,
    gateway: BadGateway,
    sender: WeightSender,
    tensors: dict[str, torch.Tensor],
    mode: Literal["staged", "in_place"],
) -> None:
    """The sender waits for the engine's own word: the version is whole, and its report is told."""
    version = served.next_version()
    gateway.faults["/weights/update"] = "504"
    report = sender.update(version, mode=mode)
    ruin(tensors)
    assert report.engines[gateway.url].outcome == "installed"
    assert NEW.wrong_answers(served.server.greedy) == []
    assert served.server.state()["weights"]["version"] == version


@on(DENSE_TP2)
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_weights_that_are_written_to_while_they_are_read_are_never_served(
    served: Served,
    steps: Steps,
    gateway: BadGateway,
    sender: WeightSender,
    tensors: dict[str, torch.Tensor],
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    mode: Literal["staged", "in_place"],
) -> None:
    """Nobody can say what became of the update: the memory is taken back while a rank reads on.

    In place that is a fence, which the next update lifts; staged, whatever had been here in full.
    """
    monkeypatch.setattr(known_end, "GRACE_S", 0.0)
    version = served.next_version()
    hold = steps.hold(rank=0, module=HALF_WAY)
    gateway.faults |= dict.fromkeys(LATE, "504")
    with pytest.raises(EnginesFailedError, match="update_end_unknown: what became of") as caught:
        sender.update(version, mode=mode, timeout_s=6.0)
    assert "memory was taken back" in str(caught.value)
    ruin(tensors)
    hold.unlink()
    until(lambda: served.server.state()["state"] != "updating", otherwise=served.server.state)
    state = served.server.state()
    if state["state"] == "fenced":
        assert state["fence"]["code"] in ("source_revoked", "peer_lost", "transfer_timeout")
    else:
        expected = NEW if state["weights"]["version"] == version else OLD
        assert expected.wrong_answers(served.server.greedy) == []
    gateway.heal()
    for name, tensor in NEW.tensors().items():
        tensors[name].copy_(tensor)
    sender.update(version + 1, timeout_s=60.0)
    assert NEW.wrong_answers(served.server.greedy) == []


@on(DENSE)
def test_a_deadline_ends_no_healthy_engine(
    served: Served, sender: WeightSender, tensors: dict[str, torch.Tensor]
) -> None:
    """However short, in either mode: at most a fence, which the next update lifts (D49)."""
    sender.update(served.next_version())
    for timeout_s in (0.01, 0.03, 0.05, 0.1, 0.2):
        for mode in ("in_place", "staged"):
            try:
                sender.update(served.next_version(), mode=mode, timeout_s=timeout_s)
            except EnginesFailedError as error:
                (failure,) = error.failures.values()
                assert failure.code != "live_memory_lost"
            state = served.server.state()
            assert (state["fence"] or {}).get("code") != "live_memory_lost", state
    sender.update(served.next_version(), timeout_s=60.0)
    assert NEW.wrong_answers(served.server.greedy) == []
