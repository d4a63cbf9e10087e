"""What tests of senders share: the trainer's agent, and a model to send."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.fake_engine import FakeEngine, served


@pytest.fixture(scope="module")
def server() -> Iterator[FakeEngine]:
    """A fake engine, which the tests of a module share."""
    with served(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def engine(server: FakeEngine) -> FakeEngine:
    """The same as if it had just started."""
    server.reset()
    return server


@pytest.fixture
def transport() -> Iterator[InMemoryTransport]:
    agent = InMemoryTransport("trainer")
    yield agent
    agent.close()


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6, bias=False))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also in a run that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
