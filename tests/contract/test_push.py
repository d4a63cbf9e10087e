"""Pushes: trainers write into the memory of the engine's ranks, over the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_plugins.trainer_sender import WeightSender
from tests.support.configurations import ALL_MODELS, DENSE, DENSE_TP2, MOE_TP2, NEW, OLD, on
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.fsdp_trainer import training
from tests.support.held_weights import held_weights
from tests.support.in_memory_server import in_memory_server
from tests.support.live_models import LIVE, LiveModel
from tests.support.megatron_fixtures import megatron_cases
from tests.support.problems import problem
from tests.support.rank_process import ranks_of
from tests.support.served import Served


def _first(served: Served) -> LiveModel:
    """What a server was started with."""
    model = served.configuration.model
    assert isinstance(model, LiveModel)
    return model


def _pushing(served: Served, tensors: Any) -> WeightSender:
    config = _first(served).config()
    return WeightSender.from_hf(
        tensors, engines=served.server.url, token=TOKEN, config=config, direction="push"
    )


@on(*ALL_MODELS)
def test_tokens_are_those_of_what_was_written(served: Served) -> None:
    """Forth and back from the same memory; every byte by a write of the trainer's."""
    served.restore(_first(served))
    models = [LiveModel(kind=_first(served).kind, version=each) for each in (1, 0, 1)]
    memory = models[0].tensors()
    direct: list[bool] = []
    with _pushing(served, memory) as sender:
        for model in models:
            for name, tensor in model.tensors().items():
                memory[name].copy_(tensor)
            report = sender.update(served.next_version())
            assert model.wrong_answers(served.server.greedy) == []
            (told,) = report.engines.values()
            assert told.bytes_moved >= told.bytes_needed > 0
            assert told.direct_bytes + told.staged_bytes + told.loader_bytes == told.bytes_needed
            if served.lands_directly:
                assert told.loader_bytes in (0, told.bytes_needed), "once, to prove the map"
            (plan,) = report.plans.values()
            assert (plan.direction, plan.direct_bytes) == ("push", told.direct_bytes)
            direct.append(told.direct_bytes == told.bytes_needed)
        assert direct[-1] == served.lands_directly


@pytest.mark.parametrize(
    ("served", "mesh"),
    [
        pytest.param(MOE_TP2, "3", id="moe-tp2-uneven"),
        pytest.param(DENSE_TP2, "2x2", id="dense-tp2-hsdp"),
    ],
    indirect=["served"],
)
def test_each_process_of_a_trainer_writes_its_own_shards(
    served: Served, mesh: str, tmp_path: Path
) -> None:
    """To every rank of the engine; the commit comes when all have written."""
    first = _first(served)
    versions = [LiveModel(kind=first.kind, version=each) for each in (1, 0, 1)]
    rendezvous = tmp_path / "rendezvous"
    with training(served, mesh, rendezvous, *versions, direction="push") as trainer:
        for model in versions:
            report = trainer.report()
            assert served.server.state()["weights"]["version"] == report["version"]
            assert model.wrong_answers(served.server.greedy) == []
            if served.lands_directly:
                assert_holds(served.server, model)
            trainer.go_on()
        assert set(trainer.end()) == {0}


@on(DENSE)
def test_each_rank_of_a_megatron_job_writes_its_own_shards(served: Served, tmp_path: Path) -> None:
    """TP 2 and PP 2, a process for each; the next job's first push lands directly."""
    cases = {each.name: each for each in megatron_cases(LIVE)}
    for version in (1, 0):
        case = cases[f"qwen3_live_tp2_pp2_v{version}"]
        model = LiveModel(kind="qwen3_live", version=version)
        wanted = str(served.next_version())
        store = str(tmp_path / f"store-{version}")
        options = [store, served.server.url, TOKEN, str(case.folder), wanted, "push"]
        arguments = [[str(rank), "4", *options] for rank in range(4)]
        with ranks_of("tests.support.megatron_trainer_rank", arguments) as ranks:
            said = [rank.stdout.read().strip().splitlines()[-1] for rank in ranks]
            assert [rank.wait(60) for rank in ranks] == [0] * 4
        assert len(set(said)) == 1
        assert model.wrong_answers(served.server.greedy) == []
        if served.lands_directly:
            assert_holds(served.server, model)


@pytest.mark.core
def test_an_engine_that_joins_late_gets_every_byte(tmp_path: Path) -> None:
    """After two pushes to the other one, which feeds it their version and lands the next ones."""
    model = OLD.copy_to(tmp_path / "model")
    with (
        in_memory_server(model, tmp_path / "first.log") as first,
        in_memory_server(model, tmp_path / "late.log", tensor_parallel=2) as late,
    ):
        steps = ("push", "push", f"join:{late.url}", "push")
        one, other = pushed_by_two(first, tmp_path, 1, *steps)
        assert one == other == [{"step": step, "version": n} for n, step in enumerate(steps, 1)]
        assert outcomes(first, 9) == ["installed"] * 4
        assert outcomes(late, 9) == ["installed"] * 3  # what the first one holds, and two pushes
        for server in (first, late):
            assert_holds(server, NEW)


@on(DENSE_TP2)
def test_an_update_in_one_call_says_that_somebody_must_write(served: Served) -> None:
    """409 with the three steps; nothing was touched."""
    served.restore(OLD)
    connected = served.offer(OLD).connect(direction="push")
    assert connected.status_code == 200, connected.text
    plan = connected.json()
    ranks = served.configuration.tensor_parallel
    assert [each["tp_rank"] for each in plan["destinations"]] == list(range(ranks))
    refused = served.update(plan["plan_id"])
    assert "is a push" in problem(refused, 409, "illegal_state")
    assert "write" in refused.json()["remedy"]
    assert OLD.wrong_answers(served.server.greedy) == []


@on(DENSE_TP2)
def test_a_trainer_rank_that_fails_makes_all_raise_and_the_engine_abort(
    served: Served, tmp_path: Path
) -> None:
    """Every rank hears whose write it was; nothing half written serves; the next push works."""
    served.restore(OLD)
    server, version = served.server, served.next_version()
    steps = ("break:1", "push", "break:0", "push")
    first, second = pushed_by_two(server, tmp_path, version, *steps)
    assert first == second
    for place, rank in ((0, 1), (2, 0)):
        assert "TransportError" in first[place]["error"]
        assert f"failed on trainer rank {rank} of 2" in first[place]["error"]
    for place in (1, 3):
        assert first[place] == {"step": "push", "version": version + place}
    assert outcomes(server, 4) == ["installed", "aborted", "installed", "aborted"]
    assert NEW.wrong_answers(server.greedy) == []


@pytest.mark.core
def test_a_trainer_rank_that_dies_leaves_the_old_weights(tmp_path: Path) -> None:
    """The others raise; the engine serves on beside a buffer that is not used again."""
    model, log = OLD.copy_to(tmp_path / "model"), tmp_path / "server.log"
    with in_memory_server(model, log) as server:
        survivor, gone = pushed_by_two(server, tmp_path, 1, "die:1")
        assert "lost the other trainer ranks" in survivor[0]["error"]
        assert gone == []
        # The survivor's abort, or the engine's own look at the dead one, whichever came first.
        assert outcomes(server, 1) in (["aborted"], ["failed"])
        assert server.state()["state"] == "serving"
        assert OLD.wrong_answers(server.greedy) == []
        (tmp_path / "rendezvous").unlink()
        pushed_by_two(server, tmp_path, 2, "push")
        assert NEW.wrong_answers(server.greedy) == []


def pushed_by_two(
    server: EngineServer, folder: Path, version: int, *steps: str
) -> list[list[dict[str, Any]]]:
    """Push the new weights from two processes, step by step; what each said."""
    options = [str(folder / "rendezvous"), server.url, TOKEN, str(version), str(NEW.folder)]
    arguments = [[str(rank), "2", *options, *steps] for rank in range(2)]
    with ranks_of("tests.support.push_trainer_rank", arguments) as ranks:
        return [[json.loads(line) for line in rank.stdout] for rank in ranks]


def assert_holds(server: EngineServer, model: LiveModel) -> None:
    """The live parameters of all ranks, bit for bit."""
    held, expected = held_weights(server.admin.get("/weights/manifest")), model.tensors()
    assert set(held) == set(expected)
    assert [name for name in held if not torch.equal(held[name], expected[name])] == []


def outcomes(server: EngineServer, count: int) -> list[str]:
    """Of the last updates, newest first."""
    history = server.admin.get("/weights").json()["history"]
    return [report["outcome"] for report in history[:count]]
