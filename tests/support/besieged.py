"""A server under a memory limit, attacked: what the limit leaves, and what the judge expects."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import LinearRegression, linear_regression
from typing import Any, NamedTuple

import psutil

from tests.support.chaos import Outcome, scored, summary
from tests.support.engine_server import EngineServer
from tests.support.engines import Engine
from tests.support.gate_models import DENSE, PINNED_ALLOCATOR, GateModel
from tests.support.memory_cgroup import MemoryCgroup
from tests.support.waiting import until

__all__ = [
    "FITTED",
    "LONG",
    "ROOM_BYTES",
    "Judgement",
    "Siege",
    "besieged",
    "judged",
    "measured_line",
]

MIB = 1 << 20
ROOM_BYTES = 400 * MIB
"""What an engine may take beyond what it has when nothing runs.

2,048 plain tokens fit, and 2,048 with the logits of each do not: 8 bytes for each of 32,768 words.
"""
LONG = 2048
"""Tokens of such a prompt."""
FAR_BYTES = 8 << 30
"""More than a limit leaves, less than a machine that runs the tests has."""
FITTED = tuple(size * part // 4 for size in (128, 256, 512, 1024, 2048) for part in (4, 5, 6))
"""Lengths that lines are drawn from: three of each power of two, of which the first is cold."""
SERVED_BEFORE = (*range(65, 105), max(FITTED))
"""Lengths of prompts that come before those.

Until oneDNN has all the kernels that it may keep, a step of a new length takes a MiB more; the
longest prompt makes workspaces that stay.
"""
_ARGUMENTS = {
    "vllm": ("--max-model-len", "8192", "--max-num-batched-tokens", "4096"),
    "sglang": (
        "--engine-plugins-enable",
        "--max-total-tokens",
        "16384",
        "--chunked-prefill-size",
        "4096",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Siege:
    """A server that may not grow.

    Attributes:
        server: to be attacked.
        engine_pid: of the process that computes.
        model: that it serves.
    """

    server: EngineServer
    engine_pid: int
    model: GateModel

    def prompt(self, tokens: int, seed: int = 0) -> list[int]:
        """A prompt that no other shares the beginning of."""
        chance = random.Random(f"{tokens} {seed}")
        return [chance.randrange(1, self.model.vocab) for _ in range(tokens)]

    def gate(self) -> dict[str, Any]:
        """What the gate says of itself."""
        response = self.server.admin.get("/prefill-gate")
        response.raise_for_status()
        return dict(response.json())

    def configure(self, **changes: Any) -> None:
        """Change the gate's settings."""
        response = self.server.admin.patch("/prefill-gate", json=changes)
        assert response.status_code == 200, response.text

    def warm(self, lengths: Iterable[int]) -> None:
        """Serve a prompt of each length, and have the gate forget what it measured of them."""
        for place, tokens in enumerate(lengths):
            self.server.greedy(self.prompt(tokens, 100 + place), 1)
        self.server.admin.post("/prefill-gate/reset").raise_for_status()

    def calibrate(self) -> None:
        """One step of each of `FITTED`, plain and with the logits of every token."""
        self.warm(SERVED_BEFORE)
        for tokens in FITTED:
            self.server.greedy(self.prompt(tokens), 1)
            scored(self.server, self.prompt(tokens, 1)).raise_for_status()

    def limit_addresses(self, room_bytes: int = ROOM_BYTES) -> None:
        """From now on the engine's process may map so much more than it has, and no more."""
        _, hard = resource.prlimit(self.engine_pid, resource.RLIMIT_AS)
        limit = psutil.Process(self.engine_pid).memory_info().vms + room_bytes
        resource.prlimit(self.engine_pid, resource.RLIMIT_AS, (limit, hard))

    def unlimit_addresses(self) -> None:
        """As before `limit_addresses`."""
        _, hard = resource.prlimit(self.engine_pid, resource.RLIMIT_AS)
        resource.prlimit(self.engine_pid, resource.RLIMIT_AS, (hard, hard))

    def move_to(self, group: MemoryCgroup, room_bytes: int = ROOM_BYTES) -> None:
        """From now on the kernel kills the engine's process if it takes so much more."""
        group.add(self.engine_pid)
        group.limit(room_bytes)

    def wait_until_seen(self) -> None:
        """The ranks look for limits twice a second, and the gate is asked with the next step."""

        def cap_after_a_step() -> int:
            self.server.greedy([3, 1, 4], 1)
            return int(self.gate()["cap_bytes"])

        until(
            lambda: cap_after_a_step() < FAR_BYTES,
            within_s=30,
            otherwise=lambda: "the gate does not see the limit",
        )

    def lives(self) -> bool:
        """Whether the engine still generates."""
        if not psutil.pid_exists(self.engine_pid):
            return False
        return self.server.complete([3, 1, 4], 2).status_code == 200


@contextmanager
def besieged(
    engine: Engine,
    folder: Path,
    *,
    mode: str,
    model: GateModel = DENSE,
    arguments: Sequence[str] = (),
    **settings: object,
) -> Iterator[Siege]:
    """A server whose allocator shows every transient; not limited yet."""
    environment = {
        **PINNED_ALLOCATOR,
        "ENGINE_PLUGINS_PREFILL_GATE": mode,
        "ENGINE_PLUGINS_PREFILL_MARGIN_BYTES": str(16 * MIB),
        "ENGINE_PLUGINS_PREFILL_CALIBRATION_DIR": str(folder / "calibration"),
        **{f"ENGINE_PLUGINS_{name.upper()}": str(value) for name, value in settings.items()},
    }
    with engine.serve(
        model.copy_to(folder / "model"),
        folder / "server.log",
        arguments=[*_ARGUMENTS[engine.kind], *arguments],
        environment=environment,
    ) as server:
        until(
            lambda: bool(server.state()["workers"]), otherwise=lambda: f"no rank: {server.state()}"
        )
        workers = server.state()["workers"]
        yield Siege(server=server, engine_pid=int(workers[0]["pid"]), model=model)


class Sieged(NamedTuple):
    """A server under siege, and what was seen of it before.

    Attributes:
        siege: of the server.
        answer: to a long prompt with all its logits, when it had room, and no gate.
        needs: bytes over tokens of such prompts.
    """

    siege: Siege
    answer: dict[str, Any]
    needs: LinearRegression


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the mixture has shown.

    Attributes:
        table: how many of each kind met each end.
        unanswered_small: small requests that were not answered in full.
        false_refusals: refused requests that an idle engine had room for, with a margin of 5 %.
        broken: answers that ended with an error after they had begun.
        lost: connections that broke.
        untold: refusals that do not say what fits, or when to come back.
    """

    table: dict[str, dict[str, int]]
    unanswered_small: int
    false_refusals: int
    broken: int
    lost: int
    untold: int


def judged(outcomes: Sequence[Outcome], *, needs: LinearRegression, room_bytes: int) -> Judgement:
    """Hold outcomes against what was measured.

    Args:
        outcomes: of the mixture.
        needs: bytes over tokens of a prompt with all its logits in one step; plain ones need
            less.
        room_bytes: that an idle engine has.
    """

    def fits(outcome: Outcome) -> bool:
        if outcome.attack.kind != "logprobs":
            return True
        needed = needs.intercept + needs.slope * len(outcome.attack.prompt)
        return needed < 0.95 * room_bytes

    refused = [each for each in outcomes if each.refused]
    return Judgement(
        table=summary(outcomes),
        unanswered_small=sum(
            each.attack.kind in ("chat", "stream") and not each.answered for each in outcomes
        ),
        false_refusals=sum(map(fits, refused)),
        broken=sum(bool(each.broken) and each.status == 200 for each in outcomes),
        lost=sum(each.status == 0 or each.status == 500 for each in outcomes),
        untold=sum(
            each.retry_after is None if each.status == 503 else "tokens" not in each.body
            for each in refused
        ),
    )


def measured_line(gate: dict[str, Any]) -> LinearRegression:
    """Bytes of a prompt with its logits over its tokens, from what the kernel measured."""
    steps = [step for step in gate["recent"] if step["prompt_logprob_rows"] >= 256]
    return linear_regression(
        [step["prompt_logprob_rows"] for step in steps], [step["measured_bytes"] for step in steps]
    )
