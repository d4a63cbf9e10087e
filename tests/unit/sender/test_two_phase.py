"""All engines take a version, or none does; and in a push every byte is there first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
import torch

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import PeerError, SettingsError, TransferTimeoutError
from engine_plugins.sender.engines import EngineLink
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.contract.destinations import Destination
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.sources.torch_source import hf_boxes
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served
from tests.support.push_target import PushTarget

DIRECTIONS = pytest.mark.parametrize("direction", ["pull", "push"])


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(FakeEngine())) for _ in range(2)]


@pytest.fixture
def engines(servers: list[FakeEngine]) -> list[FakeEngine]:
    """Two new engines, each behind its own HTTP server."""
    for engine in servers:
        engine.reset()
    return servers


def sender_of(
    model: torch.nn.Module, engines: list[FakeEngine], transport: InMemoryTransport, **more: Any
) -> WeightSender:
    urls = [engine.url for engine in engines]
    tensors = model.named_parameters()
    more = {"two_phase": True, **more}
    return WeightSender.from_hf(tensors, engines=urls, token=TOKEN, transport=transport, **more)


def train(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def holds(engine: FakeEngine, model: torch.nn.Module) -> bool:
    tensors = dict(model.named_parameters())
    return tensors.keys() == engine.weights.keys() and all(
        torch.equal(tensors[name], engine.weights[name]) for name in tensors
    )


@DIRECTIONS
def test_every_engine_gets_every_version(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    direction: str,
) -> None:
    """One plan for many versions; of a push two, as the first may have shown a shorter way."""
    with sender_of(model, engines, transport, direction=direction) as sender:
        for version in (1, 2, 3):
            train(model)
            report = sender.update(version)
            assert all(holds(engine, model) and engine.version == version for engine in engines)
            assert [each.outcome for each in report.engines.values()] == ["installed"] * 2
            assert not any(plan.destinations for plan in report.plans.values())
    for engine in engines:
        assert len(engine.plans) == (1 if direction == "pull" else 2)
        assert (engine.prepared, engine.aborts) == ({}, [])


@DIRECTIONS
def test_one_engine_that_cannot_prepare_keeps_all_from_committing(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    direction: str,
) -> None:
    """The error names both: what one refused, and that the other gave up and holds the old."""
    engines[1].version = 9
    with sender_of(model, engines, transport, direction=direction) as sender:
        with pytest.raises(EnginesFailedError) as caught:
            sender.update(5)
        failures = caught.value.failures
        assert failures[engines[1].url].code == "stale_version"
        assert failures[engines[0].url].code == "update_aborted"
        assert f"{engines[1].url} could not prepare" in failures[engines[0].url].detail
        assert failures[engines[0].url].holds == "the weights it started with, serving"
        assert failures[engines[1].url].holds == "version 9, serving"
        assert (engines[0].version, engines[0].weights) == (None, {})
        assert [told["writes_ended"] for told in engines[0].aborts] == [True]
        sender.update(10)
    assert all(holds(engine, model) and engine.version == 10 for engine in engines)


@DIRECTIONS
def test_an_engine_that_restarted_is_told_anew_while_the_other_waits(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    direction: str,
) -> None:
    """A second round for the one; nobody is aborted for it."""
    with sender_of(model, engines, transport, direction=direction) as sender:
        sender.update(1)
        engines[0].restart()
        train(model)
        sender.update(2)
    assert all(holds(engine, model) and engine.version == 2 for engine in engines)
    assert not engines[0].aborts
    assert not engines[1].aborts


@DIRECTIONS
def test_an_engine_may_join_between_updates(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    direction: str,
) -> None:
    """The next version is on both; the one that was there keeps its plan."""
    with sender_of(model, engines[:1], transport, direction=direction) as sender:
        sender.update(1)
        sender.update(2)
        plans = len(engines[0].plans)
        with pytest.raises(SettingsError, match="given before"):
            sender.add_engines([engines[1].url, engines[0].url])
        sender.add_engines(engines[1].url)
        train(model)
        report = sender.update(3)
        assert list(report.engines) == [engine.url for engine in engines]
        assert all(holds(engine, model) and engine.version == 3 for engine in engines)
        assert len(engines[0].plans) == plans


def test_an_engine_that_fails_to_commit_is_named(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """The other has the version by then, and the error has its report."""
    engines[1].refuse["/weights/commit"] = Refused(500, "engine_call_failed", "the loader broke")
    with (
        sender_of(model, engines, transport) as sender,
        pytest.raises(EnginesFailedError, match="the loader broke") as caught,
    ):
        sender.update(5)
    assert list(caught.value.reports) == [engines[0].url]
    assert engines[0].version == 5


def test_an_abort_that_fails_is_told(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """The engine gives up by itself; until then it is not as the trainer wanted it."""
    engines[1].version = 9
    engines[0].refuse["/weights/abort"] = Refused(500, "engine_call_failed", "busy")
    with (
        sender_of(model, engines, transport) as sender,
        pytest.raises(EnginesFailedError, match="the abort failed: busy"),
    ):
        sender.update(5)


def test_a_broken_connection_is_asked_about_and_not_taken_for_a_failure(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """The engine goes on without its caller: its answer is fetched once it has ended."""
    engine = engines[0]
    engine.prepare_s = engine.update_s = 1.0
    with (
        WeightSource(lambda: hf_boxes(model.named_parameters()), transport) as source,
        AdminClient(engine.url, token=TOKEN, timeout_s=0.3) as client,
    ):
        link = EngineLink(client)
        link.publish({0: source.manifest_bytes})
        ids = [str(link.source_id(0))]
        request = UpdateRequest(plan_id="", version=1, request_id="r", timeout_s=0.1)
        assert link.prepare(ids, {}, request, "pull").outcome == "prepared"
        assert engine.weights == {}
        assert link.commit(request).outcome == "installed"
    assert holds(engine, model)
    assert len(engine.updates) == 1


# -- push -------------------------------------------------------------------------------------


def test_a_push_writes_only_once_all_are_ready(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Before that not one byte has left the trainer."""
    engines[1].refuse["/weights/prepare"] = Refused(422, "unsupported", "no memory")
    with sender_of(model, engines, transport, direction="push") as sender:
        with pytest.raises(EnginesFailedError):
            sender.update(1)
        (target,) = engines[0].pushed.values()
        assert not any(tensor.any() for tensor in target.tensors().values())


def test_nobody_writes_while_an_engine_still_prepares(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looked at where the slower one is about to answer: the other has been ready for long."""
    engines[1].prepare_s = 0.5
    told = engines[1]._report
    written: list[bool] = []

    def look(body: dict[str, Any], outcome: Any) -> Any:
        if outcome == "prepared":
            targets = [each for engine in engines for each in engine.pushed.values()]
            assert len(targets) == 2
            assert all(engine.pushed for engine in engines)
            tensors = [tensor for each in targets for tensor in each.tensors().values()]
            written.append(any(bool(tensor.any()) for tensor in tensors))
        return told(body, outcome)

    monkeypatch.setattr(engines[1], "_report", look)
    with sender_of(model, engines, transport, direction="push") as sender:
        sender.update(1)
    assert written == [False]
    assert all(holds(engine, model) for engine in engines)


def test_a_push_says_what_its_writes_took(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Counted before anything is given back; each update anew, whatever was prepared earlier."""
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    with sender_of(model, engines, transport, direction="push") as sender:
        for version in (1, 2, 3):
            report = sender.update(version)
            assert report.push is not None
            (rank,) = report.push.ranks
            assert rank.bytes == report.push.bytes >= 2 * nbytes
            assert (rank.writes, rank.ranges) == (2, 2 * len(list(model.parameters())))
            assert rank.posted_s > 0
            assert rank.waited_s >= 0
            assert report.push.gbps == pytest.approx(rank.bytes / rank.wire_s / 1e9)
            assert f"written by 1 rank at {report.push.gbps:.3g} GB/s on the wire" in str(report)
            assert "2 writes" in str(report)
    with sender_of(model, engines[:1], transport) as pulled:
        assert pulled.update(9).push is None


@pytest.mark.parametrize(("bytes_per_s", "ended"), [(None, True), (0.0, False)])
def test_a_push_that_fails_aborts_every_engine(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    bytes_per_s: float | None,
    ended: bool,
) -> None:
    """They are told whether a write may still be under way; the peer is named."""
    with sender_of(model, engines, transport, direction="push") as sender:
        sender.update(1)
        sender.update(2)
        *_, target = engines[1].pushed.values()
        target.transport.bytes_per_s = bytes_per_s
        if ended:
            target.close()
        train(model)
        with pytest.raises(Exception, match=target.transport.agent) as caught:
            sender.update(3, timeout_s=1.0)
        assert f"rank 0 of {engines[1].url}: 0 of 1 writes, 0 of " in str(caught.value)
        assert f"rank 0 of {engines[0].url}" not in str(caught.value)
        assert isinstance(caught.value, TransferTimeoutError) != ended
        for engine in engines:
            assert [told["writes_ended"] for told in engine.aborts] == [ended]
            assert engine.version == 2
        engines[1].restart()
        sender.update(4)
    assert all(holds(engine, model) and engine.version == 4 for engine in engines)


def test_an_engine_rank_that_was_described_wrongly_is_not_met(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Metadata whose checksum differs never reaches the transport."""
    told = PushTarget.destinations

    def damaged(target: PushTarget) -> list[Destination]:
        return [msgspec.structs.replace(each, agent_metadata=b"half") for each in told(target)]

    with sender_of(model, engines[:1], transport, direction="push") as sender:
        monkeypatch.setattr(PushTarget, "destinations", damaged)
        with pytest.raises(PeerError, match="another checksum"):
            sender.update(1)
        monkeypatch.undo()
        engines[0].restart()
        sender.update(2)
    assert [each["writes_ended"] for each in engines[0].aborts] == [True]
    assert holds(engines[0], model)


@pytest.mark.parametrize(
    "ways", [{"direction": "push", "two_phase": False}, {"fan_out": 2}, {"fan_out": 0}]
)
def test_ways_that_do_not_go_together(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    ways: dict[str, Any],
) -> None:
    """Refused when the sender is made."""
    with pytest.raises(SettingsError):
        sender_of(model, engines, transport, **ways)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_push_ends_its_writes_before_it_gives_the_memory_back(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Ctrl-C while ranks write: what is under way ends, and the engines are told that it has."""
    with sender_of(model, engines, transport, direction="push") as sender:
        sender.update(1)
        sender.update(2)
        *_, target = engines[1].pushed.values()
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        target.transport.bytes_per_s = nbytes / 1.0
        main = threading.main_thread().ident
        assert main is not None
        train(model)
        timer = threading.Timer(0.4, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            sender.update(3)
        written = {name: tensor.clone() for name, tensor in target.tensors().items()}
        train(model)
        for engine in engines:
            assert [told["writes_ended"] for told in engine.aborts] == [True]
            assert engine.version == 2
        target.transport.bytes_per_s = None
        assert all(torch.equal(written[name], each) for name, each in target.tensors().items())
        sender.update(4)
    assert all(holds(engine, model) and engine.version == 4 for engine in engines)
