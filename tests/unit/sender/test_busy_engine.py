"""An engine that another call keeps busy costs a trainer time, not a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from engine_plugins.errors import SettingsError
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served

BUSY = {
    "says-so": Refused(409, "illegal_state", "sleep is under way", retry_after="1"),
    "updating": Refused(409, "illegal_state", "version 75 is prepared", state="updating"),
}


@pytest.fixture
def sender(
    engine: FakeEngine, transport: InMemoryTransport, model: torch.nn.Module
) -> Iterator[WeightSender]:
    with WeightSender.from_hf(
        model.named_parameters, engines=engine.url, token=TOKEN, transport=transport
    ) as made:
        yield made


@pytest.mark.parametrize("path", ["/weights/connect", "/weights/update"])
@pytest.mark.parametrize("why", BUSY)
def test_it_is_asked_again_until_it_is_free(
    sender: WeightSender, engine: FakeEngine, path: str, why: str
) -> None:
    """The time that was waited is taken from the update's own."""
    engine.refuse[path] = BUSY[why]
    free = threading.Timer(0.6, engine.refuse.clear)
    free.start()
    assert sender.update(1, timeout_s=30.0).version == engine.version == 1
    free.join()
    (update,) = engine.updates
    assert 20.0 < update["timeout_s"] < 29.6


@pytest.mark.parametrize("why", BUSY)
def test_one_that_stays_busy_fails_within_the_updates_time(
    sender: WeightSender, engine: FakeEngine, why: str
) -> None:
    engine.refuse["/weights/connect"] = BUSY[why]
    began = time.monotonic()
    with pytest.raises(EnginesFailedError, match=r"asked again for \d\.\d s") as caught:
        sender.update(1, timeout_s=3.0)
    assert 1.0 < time.monotonic() - began < 3.5
    (failure,) = caught.value.failures.values()
    assert (failure.code, BUSY[why].detail in failure.detail) == ("illegal_state", True)


@pytest.mark.parametrize(
    "refusal",
    [
        Refused(409, "illegal_state", "it is fenced for good", state="fenced"),
        Refused(409, "stale_version", "version 9 is installed", state="updating"),
        Refused(503, "not_configured", "still starting"),
    ],
)
def test_what_waiting_does_not_help_is_told_at_once(
    sender: WeightSender, engine: FakeEngine, refusal: Refused
) -> None:
    engine.refuse["/weights/connect"] = refusal
    began = time.monotonic()
    with pytest.raises(EnginesFailedError):
        sender.update(1, timeout_s=30.0)
    assert time.monotonic() - began < 5


def test_one_engine_under_two_names_is_noticed(
    engine: FakeEngine, transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """It would plan twice, and refuse the second plan's update for bearing the first's id."""
    engine.more_state = {"workers": [{"tp_rank": 0, "pid": 77, "host": "here"}], "since": 1.5}
    twice = [engine.url, engine.url.replace("127.0.0.1", "localhost")]
    with (
        WeightSender.from_hf(
            model.named_parameters, engines=twice, token=TOKEN, transport=transport
        ) as sender,
        pytest.raises(SettingsError, match="are one engine") as caught,
    ):
        sender.update(1)
    assert engine.version is None
    for url in twice:
        assert url in str(caught.value)


def test_two_engines_of_one_host_are_two(
    engine: FakeEngine, transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Also in containers, where pids and hostnames repeat; only one address makes suspicious."""
    engine.more_state = {"workers": [{"tp_rank": 0, "pid": 77, "host": "here"}], "since": 1.5}
    other = FakeEngine()
    other.more_state = engine.more_state
    with (
        served(other),
        WeightSender.from_hf(
            model.named_parameters,
            engines=[engine.url, other.url],
            token=TOKEN,
            transport=transport,
        ) as sender,
    ):
        assert sender.update(1).version == engine.version == other.version == 1
