"""One case: clients ask, a trainer updates, a fault strikes at its phase, a new trainer repairs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos_update.acts import (
    Verdicts,
    in_phase,
    judge,
    new_trainer,
    probe,
    saw,
    settle,
    trainer_of,
)
from tests.chaos_update.cases import Case
from tests.chaos_update.clients import under_load
from tests.chaos_update.faults import DEADLINES_S, Scene, struck
from tests.chaos_update.fleet import Fleet, Target
from tests.chaos_update.judge import Answer
from tests.chaos_update.models import VARIANTS, Models
from tests.chaos_update.processes import Processes, held
from tests.chaos_update.proxy import Proxy
from tests.chaos_update.trainer import Outcome, Trainer

__all__ = ["Result", "run_case"]

TRIES = 3
UPDATE_S = 12.0
"""What an update may take by its trainer's will."""
UNHEARD_S = 5.0
"""The same where the engine cannot be asked any more: the trainer waits for a minute beyond it."""
GIVE_UP_S = 90.0
"""A sender that hears nothing of its engine waits for the deadline and a grace of a minute."""
OF_THE_DEAD_S = 25.0
"""How long it is heard where the engine was killed."""


@dataclass(kw_only=True)
class Result(Verdicts):
    """What became of a case.

    Attributes:
        case: which.
        tries: updates in which the phase was looked for.
        reached: whether the witness saw it; only then the case counts.
        end: `repaired`, `fenced` for good, `dead` or `unrepaired`.
        took_s: all of it, but for the start of a server.
        laps_s: its parts.

    Its notes also say what the trainer was told.
    """

    case: Case
    tries: int = 0
    reached: bool = False
    end: str = ""
    took_s: float = 0.0
    laps_s: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether all held that must hold."""
        rightly = {"repaired"}
        if self.case.kills:
            rightly.add("dead")
        if self.case.fault in ("trainer_stopped", "trainer_hung"):
            rightly.add("fenced")  # reads of a stopped trainer's memory cannot be taken back
        return not self.wrong and not self.lying and self.end in rightly


def run_case(case: Case, fleet: Fleet, folder: Path) -> Result:
    """Run a case on its server, which is ended where it may be of no more use."""
    target = fleet.target(case.server)
    result, clock = Result(case=case), _Clock()
    answers: list[Answer] = []
    with ExitStack() as stack:
        stack.enter_context(under_load(target.server, answers))
        scene = _scene(case, target, fleet.models, folder, stack)
        clock.lap("trainers")
        while not result.reached and result.tries < TRIES:
            result.tries += 1
            result.reached = _idle(scene, result) if case.phase == "idle" else _hit(scene, result)
            if scene.trainer.process.poll() is not None:
                break
        clock.lap("fault")
        settle(target)
        probe(target, answers, result)
        clock.lap("probes")
        result.end = _repair(target, fleet.models, folder, answers, result)
        clock.lap("repair")
    clock.lap("clients")
    result.notes += scene.answers_of_routes
    judge(target, answers, result)
    clock.lap("judge")
    if result.end != "repaired" or case.kills:
        fleet.close()
    result.laps_s = clock.laps_s
    result.took_s = round(sum(clock.laps_s.values()), 1)
    return result


class _Clock:
    """What takes how long."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, name: str) -> None:
        """A part has ended."""
        now = time.monotonic()
        self.laps_s[name] = round(now - self._began, 1)
        self._began = now


def _scene(case: Case, target: Target, models: Models, folder: Path, stack: ExitStack) -> Scene:
    """A proxy and the trainers, which end with the case."""
    port = httpx.URL(target.server.url).port
    assert port is not None
    proxy = Proxy(port)
    stack.callback(proxy.close)

    def trainer(url: str, two_phase: bool) -> Trainer:
        made = trainer_of(target, models, folder, url, two_phase=two_phase)
        stack.callback(made.end)
        return made

    return Scene(
        case=case,
        target=target,
        processes=Processes(target.server, case.api_servers),
        proxy=proxy,
        trainer=trainer(proxy.url, case.commit == "two"),
        rival=trainer(target.server.url, False) if case.fault == "two_trainers" else None,
    )


def _begin(scene: Scene) -> int:
    """Begin the update that the fault is to hit; its version."""
    version, weights = scene.target.next_version()
    fault = scene.case.fault
    usual_s = UNHEARD_S if fault == "proxy_gone" else UPDATE_S
    given_s = DEADLINES_S.get(fault.removeprefix("deadline_"), usual_s)
    scene.trainer.begin(
        weights=weights,
        version=version,
        then=(weights + 1) % VARIANTS,  # the next step's
        mode=scene.case.mode,
        timeout_s=given_s,
    )
    return version


def _hit(scene: Scene, result: Result) -> bool:
    """Update, and strike when the phase is there; whether it was."""
    case, began = scene.case, time.monotonic()
    version = _begin(scene)
    if case.fault in ("deadline_10ms", "deadline_50ms", "deadline_200ms"):
        reached = saw(scene.target, scene.trainer, version, case.phase)
        outcome = _told(scene, result)
        return reached and bool(outcome.error)
    if not saw(scene.target, scene.trainer, version, case.phase):
        _told(scene, result)
        return False
    mend = None
    with held(scene.processes.apis) as scene.still:
        if in_phase(scene.target.page(), version, case.phase):
            mend = struck(scene)
            if case.fault == "deadline_passed":
                left_s = began + DEADLINES_S["passed"] + 0.5 - time.monotonic()
                time.sleep(max(left_s, 0))
    if mend is not None:
        mend()
    _told(scene, result)
    return mend is not None


def _idle(scene: Scene, result: Result) -> bool:
    """A good update; the fault strikes when it is over, and another update begins meanwhile."""
    _begin(scene)
    outcome = _told(scene, result)
    if outcome.error or scene.target.page().state != "serving":
        return False
    mend = struck(scene)
    if scene.case.fault != "trainer_killed":
        _begin(scene)
        mend()
        _told(scene, result)
    return True


def _told(scene: Scene, result: Result) -> Outcome:
    """What the trainer was told, and its rival."""
    outcome = scene.trainer.outcome(OF_THE_DEAD_S if scene.case.kills else GIVE_UP_S)
    told = outcome.error or "installed"
    result.notes.append(f"told after {outcome.took_s:.1f} s: {told[:300]}")
    if scene.rival is not None and scene.rival_runs:
        scene.rival_runs = False
        rival = scene.rival.outcome(GIVE_UP_S)
        result.notes.append(f"the rival: {(rival.error or 'installed')[:200]}")
    return outcome


def _repair(
    target: Target, models: Models, folder: Path, answers: list[Answer], result: Result
) -> str:
    """A good update by a new trainer; what has become of the engine."""
    if not target.lives(killed=result.case.kills):
        return "dead"
    error = ""
    with new_trainer(target, models, folder) as trainer:
        for _ in range(TRIES):
            version, weights = target.next_version()
            trainer.begin(
                weights=weights,
                version=version,
                then=(weights + 1) % VARIANTS,
                timeout_s=60.0,
                resume=True,
            )
            error = trainer.outcome(GIVE_UP_S).error
            if not error:
                break
            settle(target)
    if not error and probe(target, answers, result):
        return "repaired"
    result.notes.append(f"not repaired: {error[:300]}")
    if not target.lives(killed=result.case.kills):
        return "dead"
    fence = target.page().fence
    return "fenced" if fence is not None and fence.for_good else "unrepaired"
