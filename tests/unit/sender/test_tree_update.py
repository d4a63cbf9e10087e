"""Engines that feed each other, over HTTP: who reads what from whom, and what goes wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from engine_plugins.errors import SettingsError
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served

NBYTES = 52 * 4


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(FakeEngine())) for _ in range(4)]


@pytest.fixture
def engines(servers: list[FakeEngine]) -> list[FakeEngine]:
    """Four new engines."""
    for engine in servers:
        engine.reset()
    return servers


def tree_sender(
    model: torch.nn.Module, engines: list[FakeEngine], transport: InMemoryTransport, fan_out: int
) -> WeightSender:
    return WeightSender.from_hf(
        model.named_parameters(),
        engines=[engine.url for engine in engines],
        token=TOKEN,
        transport=transport,
        fan_out=fan_out,
    )


def holds(engine: FakeEngine, model: torch.nn.Module, version: int) -> bool:
    return engine.version == version and all(
        torch.equal(tensor, engine.weights[name]) for name, tensor in model.named_parameters()
    )


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


def agents_read_by(engine: FakeEngine) -> set[str]:
    return {manifest.agent for manifest in engine.sources.values()}


def test_the_trainer_is_read_once_and_plans_are_kept(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Updates down a tree of arity 2: one plan for each engine, one manifest of each feeder."""
    urls = [engine.url for engine in engines]
    with tree_sender(model, engines, transport, 2) as sender:
        reports = [sender.update(version) for version in (1, 2)]
        step(model)
        reports.append(sender.update(3))
        assert all(holds(engine, model, 3) for engine in engines)
    report = reports[-1]
    assert report.fed_by == {
        urls[0]: "trainer",
        urls[1]: urls[0],
        urls[2]: urls[0],
        urls[3]: urls[1],
    }
    assert report.bytes_given == {"trainer": NBYTES, urls[0]: 2 * NBYTES, urls[1]: NBYTES}
    assert report.bytes == 4 * NBYTES
    assert f"fed by {urls[1]}" in str(report)
    assert [len(engine.plans) for engine in engines] == [1] * 4
    assert [engine.offers for engine in engines] == [3, 3, 0, 0]
    assert [len(agents_read_by(engine)) for engine in engines] == [1] * 4
    assert not any(engine.paused for engine in engines)


def test_engines_that_were_paused_stay_paused(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """By default; a caller who says resume has them all serve."""
    engines[1].paused = True
    with tree_sender(model, engines, transport, 1) as sender:
        sender.update(1)
        assert [engine.paused for engine in engines] == [False, True, False, False]
        sender.update(2, resume=True)
        assert not any(engine.paused for engine in engines)
        sender.update(3, resume=False)
        assert all(engine.paused for engine in engines)


def test_an_engine_that_cannot_offer_its_weights_feeds_nobody(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Its children go to the engine above it; where none can, the trainer feeds all that wait."""
    urls = [engine.url for engine in engines]
    packed = Refused(409, "illegal_state", "mlp.down_proj is packed")
    with tree_sender(model, engines, transport, 1) as sender:
        engines[1].refuse["/weights/manifest"] = packed
        report = sender.update(1)
        assert [report.fed_by[url] for url in urls] == ["trainer", urls[0], urls[0], urls[2]]
        engines[0].refuse["/weights/manifest"] = packed
        report = sender.update(2)
        assert set(report.fed_by.values()) == {"trainer"}
        assert all(holds(engine, model, 2) for engine in engines)


@pytest.mark.parametrize("changed", ["request_id", "version", "progress"])
def test_a_feeder_that_was_updated_meanwhile_is_found_out(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    changed: str,
) -> None:
    """What was read from it may be a mixture: the reader stays paused until another has fed it."""
    urls = [engine.url for engine in engines[:3]]
    seen: list[bool] = []
    others = {"request_id": "somebody else's", "version": 7, "progress": {"phase": "install"}}

    def another_sender() -> None:
        setattr(engines[1], changed, others[changed])
        seen.append(engines[2].paused)
        engines[2].after_update = lambda: None

    engines[2].after_update = another_sender
    with tree_sender(model, engines[:3], transport, 1) as sender:
        report = sender.update(1)
    assert seen == [True]
    assert [report.fed_by[url] for url in urls] == ["trainer", urls[0], urls[0]]
    assert [asked["force"] for asked in engines[2].updates] == [False, True]
    assert len({asked["request_id"] for asked in engines[2].updates}) == 2
    assert not engines[2].paused
    assert holds(engines[2], model, 1)


def test_a_root_that_refuses_is_named_and_another_takes_its_place(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    engines[0].version = 9
    urls = [engine.url for engine in engines]
    with (
        tree_sender(model, engines, transport, 2) as sender,
        pytest.raises(EnginesFailedError, match="version 9 is installed") as caught,
    ):
        sender.update(5)
    assert list(caught.value.failures) == urls[:1]
    assert caught.value.fed_by == {urls[1]: "trainer", urls[2]: urls[1], urls[3]: urls[1]}
    assert all(holds(engine, model, 5) for engine in engines[1:])


def test_a_reader_that_refuses_is_a_failure_of_its_own(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """It is asked once, by one feeder; its children are given to another."""
    engines[1].version = 9
    with (
        tree_sender(model, engines, transport, 1) as sender,
        pytest.raises(EnginesFailedError) as caught,
    ):
        sender.update(5)
    assert {url: failure.code for url, failure in caught.value.failures.items()} == {
        engines[1].url: "stale_version"
    }
    assert all(holds(engine, model, 5) for engine in (engines[0], *engines[2:]))


@pytest.mark.parametrize("place", [0, 2])
def test_an_engine_that_restarted_is_told_anew(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module, place: int
) -> None:
    """A root, and a leaf: their sources and plans are gone, and their own offers change."""
    with tree_sender(model, engines, transport, 2) as sender:
        sender.update(1)
        engines[place].restart()
        step(model)
        report = sender.update(2)
    assert all(holds(engine, model, 2) for engine in engines)
    assert list(report.fed_by.values()).count("trainer") == 1


def test_an_engine_that_always_forgets_is_a_failure(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    for engine in (engines[0], engines[2]):
        engine.refuse["/weights/connect"] = Refused(404, "unknown_id", "no source")
    with (
        tree_sender(model, engines, transport, 2) as sender,
        pytest.raises(EnginesFailedError) as caught,
    ):
        sender.update(1)
    assert list(caught.value.failures) == [engines[0].url, engines[2].url]
    assert all(holds(engine, model, 1) for engine in (engines[1], engines[3]))


def test_a_fan_out_below_one_is_refused(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    with pytest.raises(SettingsError, match="fan_out is 0"):
        tree_sender(model, engines, transport, 0)


def test_engines_on_loopback_do_not_feed_engines_elsewhere(
    engines: list[FakeEngine], transport: InMemoryTransport
) -> None:
    """An engine listens where its url leads, so they could not reach it: nobody is asked."""
    model = torch.nn.Linear(2, 2)
    urls = [engines[0].url, "http://engine-2.invalid:8000"]
    with (
        WeightSender.from_hf(
            model, engines=urls, token=TOKEN, transport=transport, fan_out=1
        ) as sender,
        pytest.raises(SettingsError, match=rf"cannot reach {engines[0].url} \["),
    ):
        sender.update(1)
    assert engines[0].plans == {}
