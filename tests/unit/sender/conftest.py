"""What tests of senders share: the trainer's agent, and a model to send."""

from __future__ import annotations

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
