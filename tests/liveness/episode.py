"""One row: an update under load, its stuck state, what was seen of it, and a good update."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from tests.chaos_update.acts import in_phase, judge, probe, saw, trainer_of
from tests.chaos_update.clients import under_load
from tests.chaos_update.fleet import Target
from tests.chaos_update.judge import Answer
from tests.chaos_update.models import VARIANTS
from tests.chaos_update.processes import Processes, held
from tests.liveness.calls import CALLS, begin_call
from tests.liveness.leftovers import Owned
from tests.liveness.result import TRUE_S, Result
from tests.liveness.rows import Row
from tests.liveness.servers import LiveFleet
from tests.liveness.strikes import Mend, Stage, culprits, struck
from tests.liveness.watch import Watch, exit_status
from tests.support.waiting import until

__all__ = ["ended", "repaired", "run_row"]

TRIES = 4
WATCHED_S = 20.0
"""Beyond `timeout_s`: longer than anything may take."""
REPAIR_S = 60.0
END_S = 15.0
LONG_TEXT = "told to fail: " + "a missing key, " * 4000
"""Longer than half of the page that holds the state."""


def run_row(row: Row, fleet: LiveFleet, folder: Path) -> Result:
    """Make a row's state on its server, which is ended where it is of no more use."""
    result, answers = Result(row=row), list[Answer]()
    began = time.monotonic()
    target = fleet.target(row.server)
    with ExitStack() as stack:
        if not row.is_quiet:
            stack.enter_context(under_load(target.server, answers))
        owned, stage = Owned(target), _stage(row, fleet, folder, stack)
        while not result.reached and result.tries < TRIES:
            if stage.trainer.process.poll() is not None:
                stage = _stage(row, fleet, folder, stack)
            result.tries += 1
            _hurt(stage, owned, result, fleet)
        if result.gone_s is None and result.reached:
            result.unfinished = owned.unfinished()
            repaired(stage, fleet, folder, answers, result)
    if result.gone_s is not None:
        result.ended = exit_status(target.server)
        killed_first = row.fault == "api_killed" and row.api_servers == 1
        result.left = owned.left(directory=not killed_first)
    judge(target, answers, result)
    if result.gone_s is None and not result.holds:
        result.left = ended(owned, target)
    if not result.holds or result.gone_s is not None or row.kills:
        fleet.close()
    result.took_s = round(time.monotonic() - began, 1)
    return result


def ended(owned: Owned, target: Target) -> list[str]:
    """End a server as a supervisor does; what is left of it."""
    os.kill(target.server.pid, signal.SIGTERM)
    give_up = time.monotonic() + END_S
    while owned.running() and time.monotonic() < give_up:
        time.sleep(0.2)
    return owned.left()


def _stage(row: Row, fleet: LiveFleet, folder: Path, stack: ExitStack) -> Stage:
    target = fleet.target(row.server)
    trainer = trainer_of(
        target, fleet.models, folder, target.server.url, two_phase=row.commit == "two"
    )
    stack.callback(trainer.end)
    return Stage(
        row=row,
        target=target,
        processes=Processes(target.server, row.api_servers),
        trainer=trainer,
    )


def _hurt(stage: Stage, owned: Owned, result: Result, fleet: LiveFleet) -> None:
    """Update, make the state where it is to be made, and watch how it ends."""
    row = result.row
    if row.stepping:
        fleet.steps.fail(0, 3, LONG_TEXT)
    version = 0
    if row.phase in CALLS:
        mend = _called(stage)
    elif row.phase == "before":
        mend = struck(stage)
        if not row.ends_server:
            version = _begin(stage, row)
    else:
        version = _begin(stage, row)
        if not saw(stage.target, stage.trainer, version, row.phase):
            result.notes.append(f"over too soon: {stage.trainer.outcome(0)}")
            return
        with held(stage.processes.apis) as stage.still:
            if not in_phase(stage.target.page(), version, row.phase):
                return
            mend = struck(stage)
    result.reached = True
    _watch(stage, owned, result, mend, version)


def _called(stage: Stage) -> Mend:
    """What is frozen is so before it is called; an API process is killed with the call."""
    server, phase = stage.target.server, stage.row.phase
    if phase == "wake":
        error = begin_call(server, "sleep").outcome(60).error
        assert not error, error
    if stage.row.fault != "api_killed":
        mend = struck(stage)
        stage.call = begin_call(server, phase)
        return mend
    stage.call = begin_call(server, phase)
    if phase == "drain":
        until(lambda: stage.target.page().holding is not None, otherwise=stage.target.page)
    return struck(stage)


def _begin(stage: Stage, row: Row) -> int:
    version, weights = stage.target.next_version()
    stage.trainer.begin(
        weights=weights,
        version=version,
        then=(weights + 1) % VARIANTS,
        mode=row.mode,
        timeout_s=row.timeout_s,
    )
    return version


def _watch(stage: Stage, owned: Owned, result: Result, mend: Mend, version: int) -> None:
    row = result.row
    names = culprits(stage)
    hears = stage.caller if row.tells else None
    watch = Watch(stage.target, owned, hears, knocks=not row.is_quiet, to_the_end=row.ends_server)
    if row.fault == "no_descriptors":  # nobody can be answered before there are some again
        watch.wait(row.timeout_s, for_trainer=True)
        mend()
    at_once = row.fault == "trainer_killed" and row.phase == "prepared"
    watch.wait(1.0 if at_once else row.timeout_s + WATCHED_S)
    if at_once and stage.target.page().weights.version == version:
        result.reached = False  # the commit was on its way when its trainer died
    result.told_s, result.told, result.gone_s = watch.told_s, watch.told, watch.gone_s
    result.true_s, result.door_s = watch.true_s, watch.door_s
    result.state = str(watch.state.get("state"))
    fence = watch.state.get("fence") or {}
    said = f"{watch.told} {fence.get('detail', '')}"
    gone_first = watch.gone_s is not None and (watch.told_s or 0) > watch.gone_s
    if names and watch.told != "done" and not gone_first:
        result.named = any(name in said for name in names if name)
    result.notes += [f"told: {watch.told[:600]}", f"fence: {fence}"[:600], watch.changes]
    if row.ends_server and watch.gone_s is None:
        result.notes.append(f"still there: {', '.join(owned.named())}")
    mend()
    if watch.gone_s is None:
        watch.settle(TRUE_S)
        published = watch.state.get("weights", {}).get("version")
        result.late = published == version and watch.told not in ("", "done")
        if result.late or result.true_s is None:
            result.notes.append(f"after the cause was gone: {watch.changes}")
    watch.close()


def repaired(
    stage: Stage, fleet: LiveFleet, folder: Path, answers: list[Answer], result: Result
) -> None:
    """A good update by a new trainer, or the wake once more; either must succeed the first time."""
    target = stage.target
    began = time.monotonic()
    if stage.row.phase == "wake":
        if error := begin_call(target.server, "wake").outcome(REPAIR_S).error:
            result.notes.append(f"the wake that was repeated failed: {error}")
        elif probe(target, answers, result):
            result.repaired_s = time.monotonic() - began
        return
    trainer = trainer_of(target, fleet.models, folder, target.server.url)
    began = time.monotonic()
    try:
        version, weights = target.next_version()
        trainer.begin(
            weights=weights,
            version=version,
            then=(weights + 1) % VARIANTS,
            timeout_s=REPAIR_S,
            resume=True,
        )
        error = trainer.outcome(REPAIR_S + 10).error
    finally:
        trainer.end()
    if error:
        result.notes.append(f"the good update failed: {error[:600]}")
    elif probe(target, answers, result):
        result.repaired_s = time.monotonic() - began
    else:
        result.notes.append(f"updated, and does not serve: {target.server.log_tail(5)}")
    fence = target.page().fence
    result.for_good = fence is not None and fence.for_good
