"""Engines come, go and fail: the others take the next version, and nobody serves wrong weights."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from engine_plugins.admin_answers import UpdateRequest
from engine_plugins.errors import SettingsError, SourceError
from engine_plugins.sender.report import EnginesFailedError
from engine_plugins.trainer_sender import WeightSender
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import TOKEN, FakeEngine, Refused, served

DEAD = "http://127.0.0.1:1"
"""Nothing listens there."""
NO = Refused(409, "illegal_state", "this engine is fenced")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(FakeEngine())) for _ in range(3)]


@pytest.fixture
def engines(servers: list[FakeEngine]) -> list[FakeEngine]:
    """Three new engines, each behind its own HTTP server."""
    for engine in servers:
        engine.reset()
    return servers


def sender_of(
    model: torch.nn.Module, urls: list[str], transport: InMemoryTransport, **more: Any
) -> WeightSender:
    return WeightSender.from_hf(
        model.named_parameters(), engines=urls, token=TOKEN, transport=transport, **more
    )


def train(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A step, and the weights after it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def holds(engine: FakeEngine, weights: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == engine.weights.keys() and all(
        torch.equal(weights[name], engine.weights[name]) for name in weights
    )


@pytest.mark.parametrize("more", [{}, {"two_phase": True}, {"direction": "push"}, {"fan_out": 1}])
def test_a_dead_engine_does_not_stop_the_others(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    more: dict[str, Any],
) -> None:
    """Update after update; the report names it, until it is removed."""
    alive = engines[:2]
    urls = [DEAD, *(engine.url for engine in alive)]
    with sender_of(model, urls, transport, require=2, **more) as sender:
        for version in (1, 2):
            weights = train(model)
            report = sender.update(version)
            assert list(report.failures) == [DEAD]
            assert report.failures[DEAD].code == "engine_unreachable"
            assert f"not on {DEAD}: engine_unreachable" in str(report)
            assert all(holds(engine, weights) and engine.version == version for engine in alive)
        sender.remove_engines(DEAD)
        assert not sender.update(3).failures


@pytest.mark.parametrize("more", [{}, {"two_phase": True}, {"direction": "push"}])
def test_too_few_engines_are_a_failure(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    more: dict[str, Any],
) -> None:
    """In one phase the others have it, in two nobody; who is well again takes the next one."""
    for engine in engines[:2]:
        engine.refuse |= {"/weights/update": NO, "/weights/prepare": NO}
    urls = [engine.url for engine in engines]
    with sender_of(model, urls, transport, require=2, **more) as sender:
        with pytest.raises(EnginesFailedError, match="of 3 engines, where 2 must take it"):
            sender.update(1)
        assert engines[2].version == (None if more else 1)
        engines[0].refuse.clear()
        weights = train(model)
        assert list(sender.update(2).failures) == [engines[1].url]
        assert holds(engines[0], weights)
        assert holds(engines[2], weights)


@pytest.mark.parametrize("require", [0, -1, True, 1.0, "most", None])
def test_what_no_number_of_engines_is(transport: InMemoryTransport, require: Any) -> None:
    with pytest.raises(SettingsError, match="how many engines"):
        WeightSender.from_hf(
            {"w": torch.zeros(2)}, engines=DEAD, transport=transport, require=require
        )


def test_an_update_that_cannot_succeed_is_refused_before_any_engine_is_asked(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """More required than there are, or none left."""
    url = engines[0].url
    with sender_of(model, [url], transport, require=2) as sender:
        with pytest.raises(SettingsError, match="require is 2, and there are 1"):
            sender.update(1)
        sender.remove_engines([url])
        with pytest.raises(SettingsError, match="no engine to update"):
            sender.update(1)
    assert not engines[0].sources


def test_only_engines_of_the_sender_are_removed(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """All that are named, or none; one may come back."""
    first, second, _ = engines
    with sender_of(model, [first.url, second.url], transport) as sender:
        with pytest.raises(SettingsError, match="has no engines"):
            sender.remove_engines([first.url, DEAD])
        sender.remove_engines(first.url + "/")
        sender.update(1)
        assert (first.version, second.version) == (None, 1)
        assert sender.add_engines(first.url).version == 1
        assert first.version == 1
    with pytest.raises(SourceError, match="closed"):
        sender.remove_engines(second.url)
    with pytest.raises(SourceError, match="closed"):
        sender.add_engines(second.url)


def test_a_newcomer_reads_the_version_from_an_engine_that_holds_it(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Never from the trainer, which may have stepped since: version 1 is what version 1 was."""
    first, *others = engines
    with sender_of(model, [first.url], transport) as sender:
        weights = train(model)
        sender.update(1)
        train(model)
        added = sender.add_engines([engine.url for engine in others])
        assert added.version == 1
        assert added.fed_by == dict.fromkeys((engine.url for engine in others), first.url)
        assert not added.waiting
        assert str(added).count("holds version 1") == 2
        for engine in others:
            assert holds(engine, weights)
            assert (engine.version, engine.paused) == (1, False)
        assert list(sender.update(2).engines) == [engine.url for engine in engines]


def test_a_newcomer_that_was_brought_up_feeds_the_next_one(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Also when the engine that fed it has left."""
    first, second, third = engines
    with sender_of(model, [first.url], transport) as sender:
        weights = train(model)
        sender.update(1)
        train(model)
        sender.add_engines(second.url)
        sender.remove_engines(first.url)
        assert sender.add_engines(third.url).fed_by == {third.url: second.url}
        assert holds(third, weights)


@pytest.mark.parametrize("why", ["cannot feed", "holds another", "is gone", "nothing sent"])
def test_a_newcomer_that_nobody_can_feed_waits_for_the_next_update(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    why: str,
) -> None:
    """It keeps what it has, and the answer says so."""
    first, second, _ = engines
    with sender_of(model, [first.url], transport) as sender:
        if why != "nothing sent":
            sender.update(1)
        if why == "cannot feed":
            first.refuse["/weights/manifest"] = NO
        if why == "holds another":
            first.version = 5
        if why == "is gone":
            sender.remove_engines(first.url)
        added = sender.add_engines(second.url)
        assert list(added.waiting) == [second.url]
        assert "waits for the next update" in str(added)
        assert not added.reports
        assert second.version is None
        assert not second.weights
        weights = train(model)
        sender.update(6)
        assert holds(second, weights)


def test_a_newcomer_that_fails_is_in_the_answer(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module
) -> None:
    """Beside one that does not."""
    with sender_of(model, [engines[0].url], transport) as sender:
        sender.update(1)
        added = sender.add_engines([DEAD, engines[1].url])
        assert "engine_unreachable" in added.waiting[DEAD]
        assert list(added.reports) == [engines[1].url]


@pytest.mark.usefixtures("interruptible")
def test_a_broken_off_update_says_what_it_leaves_behind(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Which engine is in the middle of what, and that it may be fenced from now on."""
    engine = engines[0]
    engine.update_s = 3.0
    main = threading.main_thread().ident
    assert main is not None
    with sender_of(model, [engine.url], transport) as sender, caplog.at_level(logging.WARNING):
        threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            sender.update(7)
    (warned,) = [each for each in caplog.messages if "broken off" in each]
    assert "version 7" in warned
    assert f"{engine.url} holds the weights it started with, and an update" in warned
    assert "is fenced" in warned
    engine.progress = None


def test_what_raises_on_closing_leaves_nothing_else_open(
    engines: list[FakeEngine],
    transport: InMemoryTransport,
    model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []
    plain = httpx.Client.close

    def close(client: httpx.Client) -> None:
        plain(client)
        closed.append(str(client.base_url))
        raise OSError("one connection cannot be closed")

    sender = sender_of(model, [engine.url for engine in engines], transport)
    monkeypatch.setattr(httpx.Client, "close", close)
    with pytest.raises(OSError, match="cannot be closed"):
        sender.close()
    assert len(closed) == 3
    sender.close()


@pytest.mark.parametrize("version", [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])])
def test_whole_numbers_of_others_are_versions(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module, version: Any
) -> None:
    with sender_of(model, [engines[0].url], transport) as sender:
        assert sender.update(version).version == engines[0].version == 3
    assert type(UpdateRequest(plan_id="", version=version, request_id="r").version) is int


@pytest.mark.parametrize(
    "version",
    [True, np.True_, torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None],
)
def test_what_is_no_whole_number_is_no_version(
    engines: list[FakeEngine], transport: InMemoryTransport, model: torch.nn.Module, version: Any
) -> None:
    with (
        sender_of(model, [engines[0].url], transport) as sender,
        pytest.raises(SettingsError, match="not a whole number"),
    ):
        sender.update(version)
    with pytest.raises(SettingsError, match="not a whole number"):
        UpdateRequest(plan_id="", version=version, request_id="r")


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (None, "engines is None"),
        (8000, "engines is 8000"),
        ([], "names none"),
        ([None], "cannot be read"),
        (["http://a:1", "http://a:1/"], "http://a:1 (as http://a:1 and http://a:1/)"),
        ("http://user:secret@a:1", "it came with a user or a password"),
        ("http://a:1?token=secret", "it came with a query"),
    ],
)
def test_urls_that_cannot_be_say_why_and_what_to_do(
    transport: InMemoryTransport, urls: Any, words: str
) -> None:
    """In the text itself: a traceback is all that people see. A secret is not repeated."""
    with pytest.raises(SettingsError) as caught:
        WeightSender.from_hf({"w": torch.zeros(2)}, engines=urls, transport=transport)
    assert words in str(caught.value)
    assert caught.value.remedy
    assert str(caught.value).endswith(f"[{caught.value.remedy}]")
    assert "secret" not in str(caught.value)
