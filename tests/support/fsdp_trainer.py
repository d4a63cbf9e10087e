"""An FSDP2 trainer of several processes, driven step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from engine_plugins.admin_answers import Direction
from tests.support.engine_server import TOKEN
from tests.support.live_models import LiveModel
from tests.support.rank_process import RankProcess, ranks_of
from tests.support.served import Served

__all__ = ["FsdpTrainer", "training"]


class FsdpTrainer:
    """The processes of a running trainer."""

    def __init__(self, ranks: list[RankProcess]) -> None:
        self._ranks = ranks

    def report(self) -> dict[str, Any]:
        """Wait for the update under way; every rank says the same of it."""
        said = [rank.stdout.readline() for rank in self._ranks]
        assert said[0], "the trainer ended; its errors are above"
        assert len(set(said)) == 1, said
        return dict(json.loads(said[0]))

    def go_on(self) -> None:
        """Let it write and send the next weights, or end."""
        for rank in self._ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()

    def end(self) -> list[int]:
        """Wait until it has ended; the exit codes."""
        return [rank.wait(60) for rank in self._ranks]


@contextmanager
def training(
    served: Served,
    mesh: str,
    rendezvous: Path,
    *models: LiveModel,
    direction: Direction = "pull",
    dtype: str = "float32",
) -> Iterator[FsdpTrainer]:
    """A trainer that sends some weights in turn, the first as the next version."""
    server, version = served.server.url, str(served.next_version())
    options = [str(rendezvous), server, TOKEN, mesh, direction, dtype, version]
    options += [str(model.folder) for model in models]
    world_size = prod(int(size) for size in mesh.split("x"))
    arguments = [[str(rank), *options] for rank in range(world_size)]
    with ranks_of("tests.support.fsdp_trainer_rank", arguments) as ranks:
        yield FsdpTrainer(ranks)
