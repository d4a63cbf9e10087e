"""Trainers that the tests of this suite share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.configurations import NEW
from tests.support.served import TCP
from tests.support.trainer_process import TrainerPool, TrainerProcess


@pytest.fixture(scope="session")
def trainers() -> Iterator[TrainerPool]:
    """Trainer processes: one lasts until a test has hurt it."""
    pool = TrainerPool()
    yield pool
    pool.close()


@pytest.fixture
def trainer(trainers: TrainerPool) -> Iterator[TrainerProcess]:
    """A trainer in a process of its own, over tcp, that offers the new weights."""
    trainer = trainers.unharmed(NEW.folder, **TCP)
    yield trainer
    if not trainer.unharmed:
        trainer.end()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """For calls that take long."""
    with ThreadPoolExecutor(6) as pool:
        yield pool
