"""A vLLM engine that drafts tokens with prediction layers, fed by a trainer that has them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.support.drafting_heads import HeadedModel
from tests.support.drafting_models import foretelling_model, save_model, successors
from tests.support.engine_server import server_environment
from tests.support.offers import offered
from tests.support.preloaded import PreloadedProcess
from tests.support.vllm_server import QUIET, VllmServer, vllm_nursery, vllm_server

pytestmark = pytest.mark.engine

PROMPT, TOKENS = [5, 7], 24


def test_what_is_drafted_after_an_update_is_what_a_fresh_engine_drafts(tmp_path: Path) -> None:
    """Tokens alone would not show it: the target checks each draft, whatever it is worth.

    Back and forth, so that one update goes through the loader and others land directly.
    """
    log = tmp_path / "log"
    with open(os.devnull) as nothing, log.open("w") as output:
        drafting = PreloadedProcess(
            vllm_nursery(),
            ["-m", "tests.support.vllm_drafting", str(tmp_path)],
            environment={**os.environ, **server_environment(log, QUIET), "VLLM_PLUGINS": ""},
            files=(nothing.fileno(), output.fileno(), output.fileno()),
        )
    try:
        assert drafting.wait(300) == 0, log.read_text()[-4000:]
    finally:
        drafting.kill()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("{")]
    said = json.loads(line)
    assert said["before"]["drafted"] != said["fresh"]["drafted"]
    assert said["after"] == [said["fresh"], said["before"], said["fresh"]]
    assert said["direct_bytes"][0] == 0 < said["direct_bytes"][-1]


def test_a_server_drafts_with_the_prediction_layer_of_the_last_update(tmp_path: Path) -> None:
    """Over HTTP: drafts that were all wrong are all accepted after the update, and back."""
    models = [foretelling_model(seed, right=bool(seed)) for seed in (0, 1)]
    folder = save_model(tmp_path / "model", models[0])
    said = [successors(model, PROMPT[-1], TOKENS) for model in models]
    _back_and_forth(folder, {"method": "mtp"}, models, said)


def test_a_server_drafts_with_the_eagle_head_of_the_last_update(tmp_path: Path) -> None:
    """The same, with a head of a checkpoint of its own, offered under `draft.`."""
    models = [HeadedModel(seed, right=bool(seed)) for seed in (0, 1)]
    folder, head = models[0].save(tmp_path)
    said = [model.successors(PROMPT[-1], TOKENS) for model in models]
    tensors = [model.tensors() for model in models]
    _back_and_forth(folder, {"method": "eagle3", "model": str(head)}, tensors, said)


def _back_and_forth(
    folder: Path,
    drafting: Mapping[str, str],
    models: Sequence[Mapping[str, torch.Tensor]],
    said: Sequence[list[int]],
) -> None:
    """Update a server of the first model, whose drafts are wrong, to the second and back."""
    speculating = json.dumps({**drafting, "num_speculative_tokens": 1})
    with vllm_server(
        folder,
        folder.with_suffix(".log"),
        arguments=("--speculative-config", speculating, "--max-model-len", "64"),
        preload=True,
    ) as server:
        assert _accepted(server, said[0]) == 0
        for version in (1, 2):
            with offered(server.admin, models[version % 2]) as offer:
                updated = offer.update(version)
            assert updated.status_code == 200, updated.text
            assert _accepted(server, said[version % 2]) == version % 2


def _accepted(server: VllmServer, said: list[int]) -> float:
    """The share of drafts that were accepted while the server gave an answer, the right one."""
    before = _drafts(server)
    assert server.greedy(PROMPT, len(said)) == said
    drafted, accepted = (now - then for now, then in zip(_drafts(server), before, strict=True))
    assert drafted >= TOKENS // 2 - 1
    return accepted / drafted


def _drafts(server: VllmServer) -> tuple[float, float]:
    """Tokens drafted and accepted since the server started."""
    text = server.http.get("/metrics").text
    drafted, accepted = (
        re.search(rf"^vllm:spec_decode_num_{kind}_tokens_total\{{.*}} (\S+)$", text, re.MULTILINE)
        for kind in ("draft", "accepted")
    )
    assert drafted is not None
    assert accepted is not None
    return float(drafted[1]), float(accepted[1])
