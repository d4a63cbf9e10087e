"""The parts of an episode: trainers, the witness of a phase, probes, and the judge's verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from engine_plugins.admin.state import EngineState
from tests.chaos_update.clients import ask
from tests.chaos_update.fleet import Target
from tests.chaos_update.judge import Answer, judged
from tests.chaos_update.models import SHORT, Models
from tests.chaos_update.trainer import Trainer

__all__ = ["Verdicts", "in_phase", "judge", "new_trainer", "probe", "saw", "settle", "trainer_of"]

SETTLE_S = 40.0
PROBED_TOKENS = 8
_PAGE_PHASE = {"publish": "resume"}
"""The version is published when the page says that the engine resumes."""


@dataclass(kw_only=True)
class Verdicts:
    """What was judged.

    Attributes:
        answers: that came, whole or broken off after tokens had come.
        wrong: of these, what no whole weights say.
        lying: of these, what the weights of its label do not say.
        notes: what was wrong.
    """

    answers: int = 0
    wrong: int = 0
    lying: int = 0
    notes: list[str] = field(default_factory=list)


def trainer_of(
    target: Target, models: Models, folder: Path, url: str, *, two_phase: bool = False
) -> Trainer:
    """A trainer that speaks to a server by an url."""
    return Trainer(
        models,
        dtype=target.kind.dtype,
        url=url,
        two_phase=two_phase,
        environment=target.environment,
        log=folder / f"trainer-{time.monotonic_ns()}.log",
    )


@contextmanager
def new_trainer(target: Target, models: Models, folder: Path) -> Iterator[Trainer]:
    """A trainer of the server's own url, for as long as a context lasts."""
    trainer = trainer_of(target, models, folder, target.server.url)
    try:
        yield trainer
    finally:
        trainer.end()


def saw(target: Target, trainer: Trainer, version: int, phase: str) -> bool:
    """Wait for the phase of an update; False if the update ended without it."""
    while not in_phase(target.page(), version, phase):
        if trainer.answered:
            return False
        time.sleep(0.0003)
    return True


def in_phase(state: EngineState, version: int, phase: str) -> bool:
    """Whether an update is where it is wanted."""
    update = state.update
    return (
        update is not None
        and update.version == version
        and update.phase == _PAGE_PHASE.get(phase, phase)
    )


def settle(target: Target) -> None:
    """Wait until the engine is in the middle of nothing."""
    give_up = time.monotonic() + SETTLE_S
    while target.page().state == "updating" and time.monotonic() < give_up and not target.ended():
        time.sleep(0.1)


def probe(target: Target, answers: list[Answer], result: Verdicts) -> bool:
    """Ask a serving engine, and hold its labels against its state; whether all was answered.

    An answer under another version than the state names before and after it lies.
    """
    try:
        before = target.server.state()
        if before["state"] != "serving":
            return False
        found = [ask(target.server, prompt, PROBED_TOKENS) for prompt in SHORT[:3]]
        after = target.server.state()
    except httpx.HTTPError as error:
        result.notes.append(f"no state: {error!r}")
        return False
    answers += found
    version = before["weights"]["version"]
    if (after["state"], after["weights"]["version"]) == ("serving", version):
        label = "default" if version is None else str(version)
        for answer in found:
            if any(span.label != label for span in answer.spans or ()):
                result.lying += 1
                result.notes.append(f"/state says version {version}, an answer {answer.spans}")
    return not any(answer.broken for answer in found)


def judge(target: Target, answers: list[Answer], result: Verdicts) -> None:
    """Hold every answer against the weights that its label names."""
    for answer in list(answers):
        if not answer.tokens:
            continue
        result.answers += 1
        verdict = judged(answer, target.weights_of, target.explained)
        if verdict == "right":
            continue
        if verdict == "wrong":
            result.wrong += 1
        else:
            result.lying += 1
        if result.wrong + result.lying <= 3:
            result.notes.append(
                f"{verdict}: {len(answer.prompt)} tokens {answer.prompt[:3]}... gave "
                f"{answer.tokens[:12]} as {answer.spans}"
            )
