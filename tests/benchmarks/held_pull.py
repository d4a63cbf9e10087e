"""What a staged pull takes from generation: the same completion beside a held pull and without one.

The trainer is stopped while it is read, over tcp, where that stalls the reads: the pull lasts as
long as the completion. One server of each engine; which of a pair comes first alternates.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import httpx
from rich.table import Table

from tests.support.configurations import OLD
from tests.support.engine_server import EngineServer
from tests.support.engines import SGLANG, VLLM, Engine
from tests.support.served import TCP
from tests.support.sglang_server import sglang_server
from tests.support.trainer_process import TrainerProcess, trainer_process
from tests.support.waiting import until

__all__ = ["held_pull"]

TOKENS = 150
"""Of the completion: each is a step of the engine."""


def held_pull(folder: Path, sglang_python: Path, *, pairs: int) -> Table:
    """Seconds beside a held pull over seconds without one: median and quartiles."""
    table = Table(title=f"{TOKENS} steps beside a held staged pull / without one")
    for column in ("engine", "pairs", "p25", "median", "p75", "steps/s, without"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    sglang = replace(SGLANG, serve=partial(sglang_server, python=sglang_python))
    for engine in (VLLM, sglang):
        place = folder / f"held-{engine.kind}"
        place.mkdir()
        seconds = list(_pairs(engine, place, pairs))
        quartiles = statistics.quantiles([held / free for held, free in seconds], n=4)
        rate = TOKENS / statistics.median(free for _, free in seconds)
        ratios = [f"{each:.3f}" for each in quartiles]
        table.add_row(engine.kind, str(pairs), *ratios, f"{rate:.0f}")
    return table


def _pairs(engine: Engine, folder: Path, pairs: int) -> Iterator[tuple[float, float]]:
    """Seconds of a completion beside a held pull, and without one."""
    model = OLD.copy_to(folder / "model")
    arguments = ["--engine-plugins-enable"] if engine.kind == "sglang" else []
    with (
        engine.serve(model, folder / "server.log", arguments=arguments, environment=TCP) as server,
        trainer_process(model, **TCP) as trainer,
        ThreadPoolExecutor(1) as background,
    ):
        plan = trainer.connect(server.admin)
        held = partial(_held, server, trainer, plan, background, count(1))
        for _ in range(2):
            with held():
                pass
            _completion_s(server)
        for place in range(pairs):
            took: dict[bool, float] = {}
            for beside in (True, False) if place % 2 else (False, True):
                if beside:
                    with held():
                        took[beside] = _completion_s(server)
                else:
                    took[beside] = _completion_s(server)
            yield took[True], took[False]


@contextmanager
def _held(
    server: EngineServer,
    trainer: TrainerProcess,
    plan: str,
    background: ThreadPoolExecutor,
    versions: Iterator[int],
) -> Iterator[None]:
    """A staged pull that moves nothing for as long as the context lasts, and then ends well."""
    body = {"plan_id": plan, "version": next(versions), "mode": "staged"}
    trainer.signal(signal.SIGSTOP)
    update: Future[httpx.Response] = background.submit(
        server.admin.post, "/weights/update", json=body
    )
    until(lambda: server.state()["state"] == "updating", otherwise=server.state)
    time.sleep(0.2)
    yield
    assert not update.done(), update.result().text
    trainer.signal(signal.SIGCONT)
    update.result(60).raise_for_status()


def _completion_s(server: EngineServer) -> float:
    began = time.perf_counter()
    server.complete(OLD.prompts()[0], TOKENS).raise_for_status()
    return time.perf_counter() - began
