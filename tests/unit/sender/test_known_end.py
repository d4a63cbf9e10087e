"""What a sender makes of answers that are not the engine's: it asks on, or revokes its memory."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch

from engine_plugins.sender import known_end
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.contract.version_word import CLOSED
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.bad_gateway import FAULTS, BadGateway, bad_gateway
from tests.support.fake_engine import TOKEN, FakeEngine
from tests.support.waiting import until

BROKEN = [*FAULTS, "reset", "cut"]
STEPS = ("/weights/update", "/weights/prepare", "/weights/commit", "/weights/abort")
CALLS = (*STEPS, "/weights", "/state")


@pytest.fixture
def gateway(engine: FakeEngine) -> Iterator[BadGateway]:
    with bad_gateway(engine.url) as made:
        yield made


@pytest.fixture
def sender(
    gateway: BadGateway, transport: InMemoryTransport, model: torch.nn.Module
) -> Iterator[WeightSender]:
    with sender_of(gateway, transport, model) as made:
        yield made


def sender_of(
    gateway: BadGateway, transport: InMemoryTransport, model: torch.nn.Module, **more: Any
) -> WeightSender:
    return WeightSender.from_hf(
        model.named_parameters, engines=gateway.url, token=TOKEN, transport=transport, **more
    )


def holds(engine: FakeEngine, model: torch.nn.Module) -> bool:
    return all(torch.equal(engine.weights[n], p) for n, p in model.named_parameters())


def word_of(engine: FakeEngine) -> int:
    """What the version word holds of the source that the engine was told of last."""
    manifest = list(engine.sources.values())[-1]
    return ctypes.c_uint64.from_address(manifest.version_word).value


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_end, "GRACE_S", 0.5)
    monkeypatch.setattr(known_end, "UNSEEN_S", 0.5)
    monkeypatch.setattr(known_end, "GONE_S", 0.5)


@pytest.mark.parametrize("fault", BROKEN)
def test_an_update_is_waited_for_whatever_stands_in_its_answers_place(
    sender: WeightSender,
    gateway: BadGateway,
    engine: FakeEngine,
    model: torch.nn.Module,
    fault: str,
) -> None:
    """The engine goes on reading: the report is that of its history, once it has ended."""
    engine.update_s = 0.7
    gateway.faults["/weights/update"] = fault
    began = time.monotonic()
    report = sender.update(1, timeout_s=20.0)
    assert time.monotonic() - began > 0.6
    assert report.version == engine.version == 1
    assert holds(engine, model)


@pytest.mark.parametrize("fault", ["504", "reset", "problem"])
def test_asking_is_repeated(
    sender: WeightSender, gateway: BadGateway, engine: FakeEngine, fault: str
) -> None:
    """One failed question ends no wait, nor do several of both; five take a second or more."""
    engine.update_s = 2.5
    gateway.faults |= {"/weights/update": "504", "/state": fault, "/weights": fault}
    gateway.times |= {"/state": 2, "/weights": 3}
    assert sender.update(1, timeout_s=20.0).version == engine.version == 1
    assert gateway.times == {"/state": 0, "/weights": 0}


@pytest.mark.parametrize("step", ["prepare", "commit"])
@pytest.mark.parametrize("fault", ["504", "reset", "half"])
def test_both_phases_are_asked_about(
    gateway: BadGateway,
    transport: InMemoryTransport,
    model: torch.nn.Module,
    engine: FakeEngine,
    step: Literal["prepare", "commit"],
    fault: str,
) -> None:
    """The answer to prepare is given again, and so is that of a commit."""
    engine.prepare_s = engine.update_s = 0.5
    gateway.faults[f"/weights/{step}"] = fault
    gateway.times[f"/weights/{step}"] = 2
    with sender_of(gateway, transport, model, two_phase=True) as sender:
        assert sender.update(1, timeout_s=20.0).version == engine.version == 1
    assert len(engine.updates) == 1


def test_a_commit_that_never_arrived_is_sent_again(
    gateway: BadGateway, transport: InMemoryTransport, model: torch.nn.Module, engine: FakeEngine
) -> None:
    """The engine still waits for it."""
    gateway.faults["/weights/commit"] = "502"
    gateway.times["/weights/commit"] = 1
    gateway.delivery = "never"
    with sender_of(gateway, transport, model, two_phase=True) as sender:
        assert sender.update(1, timeout_s=20.0).version == engine.version == 1


@pytest.mark.parametrize("fault", ["504", "reset"])
def test_memory_is_taken_back_where_the_end_cannot_be_known(
    sender: WeightSender,
    gateway: BadGateway,
    engine: FakeEngine,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The error says so, the word has moved by then, and a later update works as ever."""
    impatient(monkeypatch)
    sender.update(1)
    engine.update_s = 3.0
    gateway.faults |= dict.fromkeys(("/weights/update", "/state", "/weights"), fault)
    with pytest.raises(EnginesFailedError, match="cannot be found out") as caught:
        sender.update(2, timeout_s=0.5)
    (failure,) = caught.value.failures.values()
    assert failure.code == "update_end_unknown"
    assert "memory was taken back" in failure.detail
    assert engine.progress, "the engine is still in the middle of it"
    assert word_of(engine) == CLOSED
    # The wire within a process refuses memory that was taken back.
    refused = lambda: any(status == 422 for status, _ in gateway.answered)  # noqa: E731
    until(refused, otherwise=lambda: gateway.answered)
    gateway.heal()
    engine.update_s, engine.progress = 0.0, None
    sender.update(3)
    assert holds(engine, model)
    assert engine.version == 3


@pytest.mark.parametrize("delivery", ["never", "late"])
def test_a_request_that_did_not_arrive_is_not_waited_for_to_the_end(
    sender: WeightSender,
    gateway: BadGateway,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    delivery: str,
) -> None:
    """The engine answers and has not begun it; should it arrive later, its word is no longer so."""
    monkeypatch.setattr(known_end, "UNSEEN_S", 0.5)
    gateway.faults["/weights/update"] = "504"
    gateway.delivery = delivery
    began = time.monotonic()
    with pytest.raises(EnginesFailedError, match="cannot be found out"):
        sender.update(1, timeout_s=60.0)
    assert time.monotonic() - began < 20
    assert word_of(engine) == CLOSED
    gateway.deliver.set()
    if delivery == "late":
        until(lambda: bool(gateway.answered), otherwise=lambda: engine.progress)
        asked = engine.updates[-1]["source_word"]
        assert asked not in (None, CLOSED, word_of(engine))


def test_an_engines_own_refusal_is_believed_at_once(
    sender: WeightSender, engine: FakeEngine
) -> None:
    """Nothing of ours is in it then: nothing is asked, and nothing taken back."""
    engine.version = 9
    with pytest.raises(EnginesFailedError, match="version 9 is installed"):
        sender.update(1)
    sources = len(engine.sources)
    sender.update(10)
    assert len(engine.sources) == sources, "the memory is still the one that was offered"


def test_the_word_is_closed_between_updates(sender: WeightSender, engine: FakeEngine) -> None:
    """It travels with the request, another for each; a stray reader afterwards finds none."""
    for version in (1, 2):
        sender.update(version)
        assert word_of(engine) == CLOSED
    words = [told["source_word"] for told in engine.updates]
    assert len(set(words)) == 2
    assert CLOSED not in words


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("two_phase", [False, True])
def test_an_interrupt_takes_the_memory_back_at_once(
    gateway: BadGateway,
    transport: InMemoryTransport,
    model: torch.nn.Module,
    engine: FakeEngine,
    two_phase: bool,
) -> None:
    """Ctrl-C while the engine reads; threads that speak with it do nothing more afterwards."""
    engine.update_s = engine.prepare_s = 2.0
    main = threading.main_thread().ident
    assert main is not None
    with sender_of(gateway, transport, model, two_phase=two_phase) as sender:
        timer = threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            sender.update(1)
        assert time.monotonic() - began < (10 if two_phase else 1.8)
        assert word_of(engine) == CLOSED
        timer.join()
        time.sleep(max(0.0, began + 2.5 - time.monotonic()))
        asked = len(engine.updates)
        engine.update_s = engine.prepare_s = 0.0
        engine.prepared.clear()
        engine.progress = None
        sender.update(2)
        assert holds(engine, model)
        assert len(engine.updates) == asked + 1
        assert engine.version == 2


def test_closing_while_an_update_runs_takes_the_memory_back(
    gateway: BadGateway, transport: InMemoryTransport, model: torch.nn.Module, engine: FakeEngine
) -> None:
    """Its word moves before anything is freed."""
    engine.update_s = 1.0
    sender = sender_of(gateway, transport, model)
    failures: list[BaseException] = []

    def update() -> None:
        try:
            sender.update(1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=update)
    thread.start()
    until(lambda: bool(engine.progress), otherwise=lambda: failures)
    manifest = list(engine.sources.values())[-1]
    sender.close()
    assert ctypes.c_uint64.from_address(manifest.version_word).value == CLOSED
    thread.join(20)
    assert failures


@pytest.mark.parametrize("two_phase", [False, True])
def test_the_trainer_is_told_within_5_s_of_the_deadline_whatever_stands_still(
    gateway: BadGateway,
    transport: InMemoryTransport,
    model: torch.nn.Module,
    engine: FakeEngine,
    two_phase: bool,
) -> None:
    """Connections are accepted, as the kernel does for a process that is stopped."""
    with sender_of(gateway, transport, model, two_phase=two_phase) as sender:
        sender.update(1)
        gateway.faults |= dict.fromkeys(CALLS, "hang")
        gateway.delivery = "never"
        began = time.monotonic()
        with pytest.raises(EnginesFailedError, match="update_end_unknown"):
            sender.update(2, timeout_s=1.0)
        told_s = time.monotonic() - began
        assert told_s < 1.0 + 5.0, told_s
        assert word_of(engine) == CLOSED
        gateway.heal()
        assert sender.update(3).version == engine.version == 3
