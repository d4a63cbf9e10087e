"""After every update a server says what HF transformers says on those weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine_plugins.trainer_sender import WeightSender
from tests.support.configurations import ALL_MODELS, DENSE, DENSE_TP2, MOE, MOE_TP2, NEW, OLD, on
from tests.support.engine_server import TOKEN
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


def _model(served: Served, version: int) -> LiveModel:
    """A version of what it was started with."""
    return LiveModel(kind=_first(served).kind, version=version)


def _sender(served: Served, model: LiveModel) -> WeightSender:
    return WeightSender.from_hf(
        model.tensors(), engines=served.server.url, token=TOKEN, config=model.config()
    )


@on(MOE, MOE_TP2)
def test_zeros_first_spoil_no_later_update(served: Served) -> None:
    """Zeros look the same packed and unpacked; trainers send them first to see that all works.

    It is the first test of these servers, so zeros are what layouts could be proven by.
    """
    server, versions = served.server, [_model(served, each) for each in (0, 1)]
    zeros = {name: torch.zeros_like(each) for name, each in versions[0].tensors().items()}
    with WeightSender.from_hf(
        zeros, engines=server.url, token=TOKEN, config=versions[0].config()
    ) as sender:
        sender.update(served.next_version())
    for model in (versions[1], versions[0], versions[1]):
        with _sender(served, model) as sender:
            sender.update(served.next_version())
        assert model.wrong_answers(server.greedy) == [], model.folder.name


@on(*ALL_MODELS)
def test_hf_tensors_forth_and_back_several_times(served: Served) -> None:
    """Two versions in turn, in place and staged; every answer is that of those weights."""
    server, versions = served.server, [_model(served, each) for each in (0, 1)]
    served.restore(_first(served))
    assert _first(served).wrong_answers(server.greedy) == [], "wrong at the start"
    with _sender(served, versions[0]) as first, _sender(served, versions[1]) as second:
        for mode in ("in_place", "staged"):
            for sender, model in ((second, versions[1]), (first, versions[0])):
                step = served.next_version()
                sender.update(step, mode=mode)
                assert model.wrong_answers(server.greedy) == [], f"step {step}, {mode}"
                assert server.state()["weights"]["version"] == step


@on(*ALL_MODELS)
def test_megatron_shards_of_every_live_case(served: Served) -> None:
    """Shards that real Megatron ranks hold (TP, PP, EP) arrive as the HF model that they are."""
    kind = _first(served).kind
    cases = [case for case in megatron_cases(LIVE) if case.hf_folder.name.startswith(kind)]
    assert len(cases) >= 2, f"no Megatron cases of {kind} under {LIVE}"
    for case in cases:
        model = _model(served, int(case.hf_folder.name[-1]))
        with WeightSender.from_megatron(
            list(case.ranks()), case.config, engines=served.server.url, token=TOKEN
        ) as sender:
            sender.update(served.next_version())
        assert model.wrong_answers(served.server.greedy) == [], case.name


@on(DENSE_TP2)
def test_one_trainer_process_per_megatron_rank(served: Served, tmp_path: Path) -> None:
    """Each process of a gloo group offers its own shards; all return the same report."""
    kind = _first(served).kind
    served.restore(OLD)
    case = next(each for each in megatron_cases(LIVE) if each.name.startswith(f"{kind}_tp2_pp1_v1"))
    version, world_size = served.next_version(), len(list(case.ranks()))
    assert world_size == 2
    options = [str(tmp_path / "store"), served.server.url, TOKEN, str(case.folder), str(version)]
    arguments = [[str(rank), str(world_size), *options] for rank in range(world_size)]
    with ranks_of("tests.support.megatron_trainer_rank", arguments) as ranks:
        said = [rank.stdout.read().strip().splitlines()[-1] for rank in ranks]
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert said[0] == said[1]
    assert json.loads(said[0])["version"] == version
    assert NEW.wrong_answers(served.server.greedy) == []


@on(*ALL_MODELS)
@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_the_report_says_what_was_moved(served: Served, mode: str) -> None:
    """Bytes, phases and buffers, rank by rank; between them the ranks need the whole model."""
    model = _model(served, 1)
    whole = sum(tensor.nbytes for tensor in model.tensors().values())
    ranks = served.configuration.tensor_parallel
    report = served.install(model, mode=mode, request_id=f"{served.next_version()} {mode}")
    plan = served.server.admin.get("/weights").json()["plans"][-1]
    assert (report["outcome"], report["mode"], report["error"]) == ("installed", mode, None)
    assert report["plan_id"] == plan["plan_id"]
    assert report["bytes_needed"] == plan["bytes_needed"] >= whole
    assert report["bytes_moved"] == plan["bytes_to_move"] >= plan["bytes_needed"]
    assert [rank["tp_rank"] for rank in report["ranks"]] == list(range(ranks))
    for rank, planned in zip(report["ranks"], plan["ranks"], strict=True):
        assert planned["bytes_needed"] <= planned["bytes_to_move"] == rank["bytes_moved"] <= whole
        scratch = planned["bytes_needed"] // 256
        assert planned["arena_bytes"] <= max(2 * planned["largest_step_bytes"], scratch)
        assert rank["peak_extra_bytes"] >= 0
    for phase in ("connect_s", "plan_s", "pull_s", "pause_s", "install_s", "flush_s"):
        assert report["phases"][phase] > 0, phase
    assert report["gbps"] > 0
    assert 0 < report["paused_s"] <= report["seconds"]
    assert served.server.admin.get("/weights").json()["history"][0] == report


@on(DENSE)
def test_a_repeated_request_id_gives_the_first_answer_again(served: Served) -> None:
    """Nothing is carried out twice; under the id of another update nothing is carried out."""
    offer, version = served.offer(NEW), served.next_version()
    once = {"request_id": f"once {version}"}
    first = offer.update(version, **once)
    assert first.status_code == 200, first.text
    plan = first.json()["plan_id"]
    before = served.server.admin.get("/weights").json()
    again = offer.update_from(plan, version, **once)
    assert (again.status_code, again.json()) == (200, first.json())
    other = offer.update_from(plan, version + 1, **once)
    assert f"version {version}" in problem(other, 409, "illegal_state")
    assert served.server.admin.get("/weights").json() == before


@on(DENSE)
@pytest.mark.parametrize("resume", [None, True, False])
@pytest.mark.parametrize("paused", [False, True], ids=["serving-before", "paused-before"])
def test_an_update_ends_in_the_state_that_was_asked_for(
    served: Served, resume: bool | None, paused: bool
) -> None:
    """By default it serves again, unless a caller had paused the engine before."""
    server = served.server
    served.restore(OLD)
    if paused:
        server.admin.post("/pause").raise_for_status()
    served.install(NEW, resume=resume)
    stays_paused = paused if resume is None else not resume
    assert server.state()["state"] == ("paused" if stays_paused else "serving")
    server.admin.post("/resume").raise_for_status()
    assert NEW.wrong_answers(server.greedy) == []


@on(DENSE)
def test_a_stale_version_is_refused_before_anything_is_asked_of_the_trainer(
    served: Served,
) -> None:
    """409, nothing in the history, and the id is free for another try."""
    report = served.install(NEW)
    offer, history = served.offer(OLD), served.server.admin.get("/weights").json()["history"]
    stale = offer.update(report["version"], request_id=f"stale {report['version']}")
    assert "not newer" in problem(stale, 409, "stale_version")
    assert served.server.admin.get("/weights").json()["history"] == history
    done = offer.update(report["version"] + 1, request_id=f"stale {report['version']}")
    assert done.status_code == 200, done.text
    assert OLD.wrong_answers(served.server.greedy) == []
