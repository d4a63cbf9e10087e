"""What the prefill gate takes of an engine's steps, in servers in use: most only decode.

Timed is what our methods take of the processor, without the engine's within them. The clock's own
calls take longer between two steps of a model than one after the other: what is left with the gate
off is theirs.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.support.engine_server import EngineServer
from tests.support.gate_models import QUICK
from tests.support.sglang_server import sglang_server
from tests.support.step_times import TIMES
from tests.support.vllm_server import vllm_server

__all__ = ["gate_steps"]

CLIENTS, REQUESTS, WARMING_REQUESTS = 6, 150, 50
MOST_PROMPT, MOST_TOKENS = 1000, 96
RAMP = 100
"""Steps after a change of mode, while the requests become as many as there are clients."""
CALIBRATED = (32, 64, 128, 256, 512, 1024, 2048)
REGIMES = {
    "gate off": None,
    "far from the cap": 0.0,
    "room for four of the longest prompts": 4.0,
    "room for one and a half": 1.5,
}
"""`None` where it is off, else the room: a factor of what a step takes; 0 for all that is free."""


def gate_steps(folder: Path, sglang_python: Path) -> Table:
    """Microseconds of a step: median, 99th percentile; and how many were run unasked."""
    table = Table(title="What the gate takes of a step, in microseconds of the processor")
    for column in ("", "p50", "p99", "prefills judged"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("vllm", "sglang"):
        place = folder / kind
        place.mkdir()
        with _server(kind, place, sglang_python) as server:
            for row in _rows(server, kind, place / "times"):
                table.add_row(*row)
    return table


def _server(kind: str, folder: Path, sglang: Path) -> AbstractContextManager[EngineServer]:
    model, log = QUICK.copy_to(folder / "model"), folder / "server.log"
    times = folder / "times"
    times.mkdir()
    environment = {
        TIMES: str(times),
        "ENGINE_PLUGINS_PREFILL_GATE": "enforce",
        "ENGINE_PLUGINS_PREFILL_MARGIN_BYTES": str(1 << 20),
        "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(folder / "calibration"),
    }
    if kind == "vllm":
        extension = "tests.support.timed_vllm.TimedExtension"
        arguments = ["--scheduler-cls", "tests.support.timed_vllm.TimedScheduler"]
        arguments += ["--no-async-scheduling"]
        return vllm_server(
            model, log, extension=extension, arguments=arguments, environment=environment
        )
    arguments = ["--engine-plugins-prefill-gate", "enforce", "--max-total-tokens", "16384"]
    return sglang_server(
        model,
        log,
        python=sglang,
        launcher="tests.support.timed_sglang",
        arguments=arguments,
        environment=environment,
    )


def _rows(server: EngineServer, kind: str, times: Path) -> Iterator[tuple[str, ...]]:
    """Of each regime and each part of the engine."""
    chance = random.Random(1)

    def prompt(tokens: int) -> list[int]:
        return [chance.randrange(1, QUICK.vocab) for _ in range(tokens)]

    def serve(requests: int) -> None:
        asked = [
            (prompt(chance.randint(20, MOST_PROMPT)), chance.randint(1, MOST_TOKENS))
            for _ in range(requests)
        ]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda each: server.greedy(*each), asked))

    for tokens in CALIBRATED * 3:
        server.greedy(prompt(tokens), 1)
    serve(WARMING_REQUESTS)
    needed = _needed(server, prompt(MOST_PROMPT))
    for where, room in REGIMES.items():
        cap = _gate(server)["used_bytes"] + round(room * needed) if room else None
        _set(server, mode="off" if room is None else "enforce", cap_bytes=cap)
        before, judged = _steps(times), _judged(server)
        serve(REQUESTS)
        share = (_judged(server) - judged) / REQUESTS
        for part, steps in _steps(times).items():
            took = steps[len(before[part]) + RAMP :]
            p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[-1]
            yield f"{kind}'s {part}, {where}", f"{p50:.1f}", f"{p99:.1f}", f"{share:.0%}"


def _steps(times: Path) -> dict[str, list[float]]:
    """Microseconds of every step until now, by part of the engine."""
    return {
        file.name: [int(line) / 1e3 for line in file.read_text().splitlines()]
        for file in sorted(times.iterdir(), reverse=True)
    }


def _needed(server: EngineServer, prompt: list[int]) -> float:
    """Bytes that a step with a long prompt takes, with the margin that is added to it."""
    server.greedy(prompt, 1)
    latest: dict[str, Any] = max(_gate(server)["recent"], key=lambda step: step["tokens"])
    share = len(prompt) / latest["tokens"]
    return float(share * latest["measured_bytes"] + latest["margin_bytes"])


def _judged(server: EngineServer) -> int:
    return sum(_gate(server)["decisions"].values())


def _gate(server: EngineServer) -> dict[str, Any]:
    return dict(server.admin.get("/prefill-gate").raise_for_status().json())


def _set(server: EngineServer, **changes: Any) -> None:
    server.admin.patch("/prefill-gate", json=changes).raise_for_status()
