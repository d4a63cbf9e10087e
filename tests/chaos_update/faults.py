"""What goes wrong: each fault is struck at its phase, and mended some seconds later."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import httpx

from tests.chaos_update.cases import Case
from tests.chaos_update.fleet import STALL_TIMEOUT_S, Target
from tests.chaos_update.processes import Processes
from tests.chaos_update.proxy import Proxy, Trouble
from tests.chaos_update.trainer import Trainer

__all__ = ["DEADLINES_S", "Scene", "struck"]

OUTAGE_S = 1.5
"""How long a process stands still, and a network is gone."""
HUNG_S = STALL_TIMEOUT_S + 1.5
"""Longer than a pull waits for a trainer."""
DEADLINES_S = {"10ms": 0.01, "50ms": 0.05, "200ms": 0.2, "passed": 2.0}
_NATIVE = {
    "vllm": [
        ("/pause?mode=keep", {}),
        ("/resume", {}),
        ("/sleep?level=2", {}),
        ("/update_weight_version", {"new_version": "9999"}),
        ("/collective_rpc", {"method": "reload_weights"}),
    ],
    "sglang": [
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/update_weight_version", {"new_version": "9999"}),
        ("/begin_weight_update", {}),
        ("/end_weight_update", {}),
        ("/release_memory_occupation", {}),
    ],
}
"""Routes of the engines' own that once moved them in the middle of an update."""


@dataclass(kw_only=True)
class Scene:
    """What a fault may hurt.

    Attributes:
        case: which fault.
        target: the server.
        processes: its pids.
        proxy: between the trainer and the server.
        trainer: in the middle of an update, except where the phase is idle.
        rival: another trainer, of the case of two.
        rival_runs: whether it updates.
        answers_of_routes: what the engine's own routes answered.
        still: processes that go on once the fault has struck.
    """

    case: Case
    target: Target
    processes: Processes
    proxy: Proxy
    trainer: Trainer
    rival: Trainer | None = None
    rival_runs: bool = False
    answers_of_routes: list[str] = field(default_factory=list)
    still: set[int] = field(default_factory=set)


def struck(scene: Scene) -> Callable[[], None]:
    """Strike; returns what mends it, which takes its time."""
    fault = scene.case.fault
    if fault.startswith("proxy_"):
        return _network(scene, cast(Trouble, fault.removeprefix("proxy_")))
    if fault.startswith(("trainer_", "left_by_")):
        return _trainer(scene, fault)
    if fault == "native_routes":
        thread = threading.Thread(target=_call_native, args=(scene,), daemon=True)
        thread.start()
        return thread.join
    if fault == "two_trainers":
        _rival(scene)
        return lambda: None
    if fault.startswith("deadline_"):
        return lambda: None
    role, _, what = fault.partition("_")
    pid = {
        "worker": scene.processes.workers[-1],
        "core": scene.processes.core,
        "api": scene.processes.apis[-1],
    }[role]
    if what == "killed":
        os.kill(pid, signal.SIGKILL)
        return lambda: time.sleep(OUTAGE_S)
    return _stopped(scene, pid)


def _network(scene: Scene, trouble: Trouble) -> Callable[[], None]:
    scene.proxy.strike(trouble)

    def mend() -> None:
        if trouble in ("reset", "hold"):
            time.sleep(OUTAGE_S)
            scene.proxy.heal()

    return mend


def _trainer(scene: Scene, fault: str) -> Callable[[], None]:
    if fault in ("trainer_stopped", "trainer_hung"):
        scene.trainer.signal(signal.SIGSTOP)

        def mend() -> None:
            time.sleep(HUNG_S if fault == "trainer_hung" else OUTAGE_S)
            scene.trainer.signal(signal.SIGCONT)

        return mend
    number = {
        "trainer_killed": signal.SIGKILL,
        "left_by_exception": signal.SIGUSR1,
        "left_by_ctrl_c": signal.SIGINT,
    }[fault]
    scene.trainer.signal(number)
    return lambda: None


def _stopped(scene: Scene, pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)
    scene.still.discard(pid)

    def mend() -> None:
        time.sleep(OUTAGE_S)
        os.kill(pid, signal.SIGCONT)

    return mend


def _rival(scene: Scene) -> None:
    """Another trainer updates at the same time."""
    assert scene.rival is not None
    version, weights = scene.target.next_version()
    scene.rival_runs = True
    scene.rival.begin(weights=weights, version=version, then=(weights + 2) % 4, timeout_s=20)


def _call_native(scene: Scene) -> None:
    with httpx.Client(base_url=scene.target.server.url, timeout=10) as http:
        for path, body in _NATIVE[scene.target.server.kind]:
            with _noted(scene, path):
                answer = http.post(path, json=body)
                scene.answers_of_routes.append(f"{path} {answer.status_code}")


@contextlib.contextmanager
def _noted(scene: Scene, path: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        scene.answers_of_routes.append(f"{path} {type(error).__name__}")
