"""FSDP2 and HSDP trainers, one process for each rank, feed a server from their shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.support.configurations import DENSE_TP2, MOE
from tests.support.engine_server import TOKEN
from tests.support.live_models import LiveModel
from tests.support.served import Served


class FsdpTrainer:
    """The processes of a running trainer."""

    def __init__(self, ranks: list[subprocess.Popen[str]]) -> None:
        self._ranks = ranks

    def report(self) -> dict[str, Any]:
        """Wait for the update under way; every rank says the same of it."""
        said = [rank.stdout.readline() for rank in self._ranks if rank.stdout]
        assert said[0], "the trainer ended; its errors are above"
        assert len(set(said)) == 1, said
        return dict(json.loads(said[0]))

    def go_on(self) -> None:
        """Let it write and send the next weights, or end."""
        for rank in self._ranks:
            assert rank.stdin
            rank.stdin.write("\n")
            rank.stdin.flush()

    def end(self) -> list[int]:
        """Wait until it has ended; the exit codes."""
        return [rank.wait(60) for rank in self._ranks]


@contextmanager
def training(
    served: Served, mesh: str, rendezvous: Path, *models: LiveModel
) -> Iterator[FsdpTrainer]:
    """A trainer that sends some weights in turn, the first as the next version."""
    options = [str(rendezvous), served.server.url, TOKEN, mesh, str(served.next_version())]
    command = [sys.executable, "-m", "tests.support.fsdp_trainer_rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *options, *(str(model.folder) for model in models)],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(prod(int(size) for size in mesh.split("x")))
    ]
    try:
        yield FsdpTrainer(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize(
    ("served", "mesh"),
    [pytest.param(MOE, "3", id="moe-uneven"), pytest.param(DENSE_TP2, "2x2", id="dense-tp2-hsdp")],
    indirect=["served"],
)
def test_a_sharded_model_is_served_as_it_is_after_every_step(
    served: Served, mesh: str, tmp_path: Path
) -> None:
    """Three ranks divide none of the rows evenly, and fused experts are cut between them."""
    first = served.configuration.model
    assert isinstance(first, LiveModel)
    versions = [LiveModel(kind=first.kind, version=each) for each in (1, 0, 1)]
    with training(served, mesh, tmp_path / "rendezvous", *versions) as trainer:
        for model in versions:
            report = trainer.report()
            assert served.server.state()["weights"]["version"] == report["version"]
            assert model.wrong_answers(served.server.greedy) == []
            trainer.go_on()
        assert set(trainer.end()) == {0}
