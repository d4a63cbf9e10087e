"""A model of the catalogue on a real server, updated by a sender: its tokens by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine_plugins.trainer_sender import WeightSender
from tests.families.family import Family
from tests.families.judge import EQUAL, FAILED, NOT_HERE, REFUSED, VERSIONS, WRONG, Verdict
from tests.families.maker import become, random_model, save
from tests.support.engine_server import TOKEN, EngineServer
from tests.support.engines import SGLANG, VLLM
from tests.support.hf_reference import greedy

__all__ = ["judged_live"]

_ENGINES = {"vllm": VLLM, "sglang": SGLANG}
_PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [200, 100, 50, 25], [7] * 3 + [77, 177, 7])
_TOKENS = 12


def judged_live(kind: str, family: Family, folder: Path) -> Verdict:
    """Serve version 0 and update the server to each version; float32, greedy.

    The model is one object, whose parameters change in place, as a trainer's do.
    """
    torch.set_num_threads(1)
    folder.mkdir()
    trained = random_model(family, seed=0, dtype=torch.float32)
    checkpoint = save(trained, family, folder / "model")
    try:
        with _ENGINES[kind].serve(checkpoint, folder / "server.log") as server:
            if wrong := _wrong_answers(server, trained):
                return Verdict(result=NOT_HERE, why=f"as it was started: {wrong}")
            return _updated(server, family, trained)
    except RuntimeError as error:  # it did not come up
        return Verdict(result=NOT_HERE, why=" ".join(str(error).split())[-300:])


def _updated(server: EngineServer, family: Family, trained: Any) -> Verdict:
    try:
        sender = WeightSender.from_hf(trained, engines=server.url, token=TOKEN, progress=False)
    except Exception as error:
        return Verdict(result=FAILED, why=f"{type(error).__name__}: {error}")
    with sender:
        for number, version in enumerate(VERSIONS, 1):
            become(trained, random_model(family, seed=version, dtype=torch.float32).state_dict())
            try:
                sender.update(version=number)
            except Exception as error:
                refused = number == 1 and server.state()["weights"]["version"] is None
                result = REFUSED if refused else FAILED
                return Verdict(result=result, why=f"update {number}: {error}")
            if wrong := _wrong_answers(server, trained):
                return Verdict(result=WRONG, why=f"update {number}: {wrong}")
    return Verdict(result=EQUAL)


def _wrong_answers(server: EngineServer, model: Any) -> str:
    """The first prompt that is answered otherwise than by transformers, if any."""
    for prompt in _PROMPTS:
        expected, answer = greedy(model, prompt, _TOKENS), server.complete(prompt, _TOKENS)
        said = answer.text[:200] if answer.is_error else server.tokens_of(answer)
        if said != expected:
            return f"{prompt}: {said} instead of {expected}"
    return ""
