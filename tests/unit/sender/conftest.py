"""What tests of senders share: the trainer's agent, and a model to send."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from engine_plugins.weights.transport.in_memory import InMemoryTransport


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
