"""Three servers feed each other: the trainer's memory is read once, and a dead one is replaced.

vLLM's are not among them: see `tests/contract/test_peers.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from engine_plugins import WeightSender
from engine_plugins.sender.report import EnginesFailedError, SenderReport
from tests.support.configurations import NEW, OLD
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.engines import Engine, engine_parameters, engines_here
from tests.support.live_models import LiveModel
from tests.support.served import TCP
from tests.support.stepping import STEPPING_FOLDER, Steps
from tests.support.waiting import until

HALF_WAY = 12
"""A module in the middle of the model's 35."""
LOADER_ONLY = {"ENGINE_PLUGINS_DIRECT_LANDING": "false"}
"""So that every install of this server goes module by module, and can be held."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A server, and what holds its installs."""

    server: EngineServer
    steps: Steps

    @property
    def url(self) -> str:
        return self.server.url

    def installing(self) -> None:
        """Wait until it is in the middle of an update."""
        until(lambda: self._phase() == "install", otherwise=self.server.state, within_s=60)

    def kill(self) -> None:
        """End every process of it at once."""
        os.killpg(self.server.pid, signal.SIGKILL)

    def serves(self, model: LiveModel, version: int) -> bool:
        """Whether it says what HF transformers says, under this version."""
        state = self.server.state()
        assert (state["state"], state["weights"]["version"]) == ("serving", version)
        return model.wrong_answers(self.server.greedy) == []

    def _phase(self) -> str | None:
        update = self.server.state()["update"]
        return None if update is None else str(update["phase"])


def _started(
    engine: Engine,
    folder: Path,
    tensor_parallel: int,
    environment: Mapping[str, str],
    stack: ExitStack,
) -> Member:
    folder.mkdir()
    steps = Steps(folder / "steps")
    steps.folder.mkdir()
    server = stack.enter_context(
        engine.serve(
            OLD.copy_to(folder / "model"),
            folder / "server.log",
            tensor_parallel=tensor_parallel,
            environment={**TCP, STEPPING_FOLDER: str(steps.folder), **environment},
            **engine.watched,
        )
    )
    return Member(server=server, steps=steps)


@pytest.fixture(
    scope="module",
    params=engine_parameters([engine for engine in engines_here() if engine.feeds_peers]),
)
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Member]]:
    """Three servers, of which the tests below kill one after the other.

    In memory the second one has two ranks: engines of different sizes feed each other.
    """
    engine, folder = request.param, tmp_path_factory.mktemp("fleet")
    of_two_ranks = 2 if engine.kind == "in_memory" else 1
    with ExitStack() as stack:
        yield [
            _started(engine, folder / "first", 1, {}, stack),
            _started(engine, folder / "second", of_two_ranks, {}, stack),
            _started(engine, folder / "third", 1, LOADER_ONLY, stack),
        ]


@contextmanager
def sending(
    tensors: Mapping[str, torch.Tensor], members: list[Member], fan_out: int | None
) -> Iterator[WeightSender]:
    with WeightSender.from_hf(
        tensors,
        engines=[member.url for member in members],
        token=TOKEN,
        config=NEW.config(),
        fan_out=fan_out,
        progress=False,
    ) as sender:
        yield sender


def test_the_trainers_bytes_leave_it_once(fleet: list[Member]) -> None:
    """Two servers are fed by the first: what the trainer writes meanwhile does not reach them."""
    leaves, tensors = fleet[1:], NEW.tensors()
    with sending(tensors, fleet, fan_out=2) as sender, ThreadPoolExecutor(1) as background:
        holds = [leaf.steps.hold(rank=0, module=1) for leaf in leaves]
        update = background.submit(sender.update, 1)
        for leaf in leaves:
            leaf.installing()
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
        for hold in holds:
            hold.unlink()
        report = update.result(120)
    _check_bytes(report, fleet)
    assert all(member.serves(NEW, 1) for member in fleet)


def test_later_updates_use_the_same_plans(fleet: list[Member]) -> None:
    """Staged, then straight from the live parameters of one engine into those of another."""
    tensors = NEW.tensors()
    with sending(tensors, fleet, fan_out=2) as sender:

        def update(
            version: int, mode: Literal["staged", "in_place"], model: LiveModel
        ) -> SenderReport:
            for name, tensor in model.tensors().items():
                tensors[name].copy_(tensor)
            report = sender.update(version, mode=mode)
            _check_bytes(report, fleet)
            assert all(member.serves(model, version) for member in fleet)
            return report

        staged, direct = update(2, "staged", OLD), update(3, "in_place", NEW)
    ids = [{url: p.plan_id for url, p in each.plans.items()} for each in (staged, direct)]
    assert ids[0] == ids[1]
    reports = [direct.engines[member.url] for member in fleet]
    landed = [sum(rank.direct_bytes for rank in each.ranks) for each in reports]
    assert landed == [*(each.bytes_needed for each in reports[:2]), 0], "the third uses its loader"


def _check_bytes(report: SenderReport, fleet: list[Member]) -> None:
    """One model has left the trainer, and the first engine has given all that the others took."""
    root, *leaves = fleet
    moved = [report.engines[leaf.url].bytes_moved for leaf in leaves]
    nbytes = sum(tensor.nbytes for tensor in NEW.tensors().values())
    assert report.fed_by == {root.url: "trainer"} | {leaf.url: root.url for leaf in leaves}
    assert report.bytes_given == {"trainer": nbytes, root.url: sum(moved)}
    assert min(moved) == nbytes


def test_newcomers_have_the_version_before_they_are_added(fleet: list[Member]) -> None:
    """From the engine that holds it: the trainer has taken a step since, and is not read."""
    first, *newcomers = fleet
    tensors, urls = OLD.tensors(), [member.url for member in newcomers]
    with sending(tensors, [first], fan_out=None) as sender:
        sender.update(4)
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
        added = sender.add_engines(urls)
    assert added.waiting == {}
    assert added.fed_by == dict.fromkeys(urls, first.url)
    assert all(member.serves(OLD, 4) for member in fleet)


def test_an_inner_engine_that_dies_is_replaced(fleet: list[Member]) -> None:
    """In a chain of three the middle one is killed while the last reads from it."""
    first, middle, last = fleet
    tensors = NEW.tensors()
    with sending(tensors, fleet, fan_out=1) as sender, ThreadPoolExecutor(1) as background:
        hold = last.steps.hold(rank=0, module=HALF_WAY)
        update = background.submit(sender.update, 5)
        last.installing()
        middle.kill()
        hold.unlink()
        with pytest.raises(EnginesFailedError, match="was lost afterwards") as caught:
            update.result(120)
    assert {url: each.code for url, each in caught.value.failures.items()} == {
        middle.url: "engine_unreachable"
    }
    assert caught.value.fed_by == {first.url: "trainer", last.url: first.url}
    moved = [caught.value.reports[member.url].bytes_moved for member in (first, last)]
    assert moved == [sum(tensor.nbytes for tensor in tensors.values())] * 2
    assert all(member.serves(NEW, 5) for member in (first, last))


def test_a_root_that_dies_is_replaced_by_the_trainer(fleet: list[Member]) -> None:
    """No other engine holds the version: the one that was half fed gets all of it from there."""
    first, _, last = fleet
    with sending(OLD.tensors(), [first, last], fan_out=1) as sender:
        with ThreadPoolExecutor(1) as background:
            hold = last.steps.hold(rank=0, module=HALF_WAY)
            update = background.submit(sender.update, 6)
            last.installing()
            first.kill()
            hold.unlink()
            with pytest.raises(EnginesFailedError) as caught:
                update.result(120)
        assert list(caught.value.failures) == [first.url]
        assert caught.value.fed_by == {last.url: "trainer"}
        assert last.serves(OLD, 6)
