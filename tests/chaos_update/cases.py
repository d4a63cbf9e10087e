"""The cases: every pair of two factors' values at least once, by a greedy choice of few cases.

A server costs half a minute, so cases do not mix the factors of servers freely: a few servers cover
the pairs among those factors, and each case is one of these servers with a fault.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

__all__ = ["MAX_CASES", "Case", "ServerKind", "cases", "part_of"]

MAX_CASES = 120
SEED = 15

IN_UPDATE = ("pull", "prepared", "install", "flush", "publish")
PHASES = (*IN_UPDATE, "idle")
KILLS = ("worker_killed", "core_killed", "api_killed")
PHASES_OF: dict[str, tuple[str, ...]] = {
    "trainer_killed": PHASES,
    "trainer_stopped": PHASES,
    "trainer_hung": ("pull", "install"),
    "left_by_exception": IN_UPDATE,
    "left_by_ctrl_c": IN_UPDATE,
    "proxy_502": IN_UPDATE,
    "proxy_504": IN_UPDATE,
    "proxy_reset": IN_UPDATE,
    "proxy_hold": IN_UPDATE,
    "proxy_cut": IN_UPDATE,
    "proxy_gone": ("pull", "install"),
    "worker_stopped": PHASES,
    "core_stopped": PHASES,
    "api_stopped": PHASES,
    **dict.fromkeys(KILLS, ("pull", "install", "publish", "idle")),
    "deadline_10ms": ("pull",),
    "deadline_50ms": ("pull",),
    "deadline_200ms": ("pull",),
    "deadline_passed": IN_UPDATE,
    "native_routes": PHASES,
    "two_trainers": PHASES,
}
"""Where a fault makes sense: between updates no answer is waited for, and no deadline runs."""


@dataclass(frozen=True, kw_only=True)
class ServerKind:
    """How a server is started.

    Attributes:
        engine: `vllm` or `sglang`.
        tensor_parallel: ranks.
        api_servers: API processes.
        wire: `cma` (what NIXL takes on one host) or `tcp`.
        dtype: of the engine and of the trainer.
    """

    engine: str
    tensor_parallel: int
    api_servers: int
    wire: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Case(ServerKind):
    """One fault in one update of one server.

    Attributes:
        mode: as `WeightSender.update` takes it.
        commit: `one` or `two` phases.
        phase: where the fault is injected.
        fault: what goes wrong; see `tests.chaos_update.faults`.
    """

    mode: str
    commit: str
    phase: str
    fault: str

    @property
    def server(self) -> ServerKind:
        """The server that it needs."""
        return ServerKind(**{name: getattr(self, name) for name in ServerKind.__annotations__})

    @property
    def kills(self) -> bool:
        """Whether it kills a process of the server's."""
        return self.fault in KILLS

    @property
    def may_end_server(self) -> bool:
        """Whether the server may be of no use afterwards."""
        return self.kills or self.fault == "trainer_hung"


Row = TypeVar("Row", bound="ServerKind")

_COST: dict[str, dict[object, int]] = {
    "tensor_parallel": {2: 3},
    "fault": dict.fromkeys((*KILLS, "trainer_hung"), 6),
}
"""What is slow here is taken only where it covers what nothing else does."""


def servers() -> list[ServerKind]:
    """The servers that cover every pair of their factors."""
    every = [
        ServerKind(engine=engine, tensor_parallel=ranks, api_servers=apis, wire=wire, dtype=dtype)
        for engine, ranks, apis, wire, dtype in itertools.product(
            ("vllm", "sglang"), (1, 2), (1, 2), ("tcp", "cma"), ("float32", "bfloat16")
        )
    ]
    return _covering(every)


def cases() -> list[Case]:
    """All cases, those of one server together, those that may end it last."""
    every = [
        Case(**asdict(server), mode=mode, commit=commit, phase=phase, fault=fault)
        for server in servers()
        for mode in ("in_place", "staged", "auto")
        for commit in ("one", "two")
        for fault, phases in PHASES_OF.items()
        for phase in phases
        if not (phase == "prepared" and commit == "one")
        and not (mode == "in_place" and commit == "two")  # what is prepared waits in a buffer
    ]
    worst = [case for case in every if _known_to_mix(case)]
    chosen = _covering(every, worst)
    first = {server: place for place, server in enumerate(servers())}
    return sorted(chosen, key=lambda case: (first[case.server], case.may_end_server))


def part_of(found: Sequence[Row], part: int, parts: int) -> list[tuple[int, Row]]:
    """The numbered cases of a part, cut so that parts are equally long and servers are shared.

    Raises:
        ValueError: there is no such part.
    """
    if not 1 <= part <= parts:
        raise ValueError(f"there is no part {part} of {parts}")
    numbered = list(enumerate(found, 1))
    return numbered[len(found) * (part - 1) // parts : len(found) * part // parts]


def _known_to_mix(case: Case) -> bool:
    """What once served a mixture of two versions on either engine."""
    where = (case.tensor_parallel, case.wire, case.mode, case.commit, case.phase)
    return case.fault == "proxy_504" and where == (1, "tcp", "staged", "one", "pull")


def _covering(every: Sequence[Row], chosen: Sequence[Row] = ()) -> list[Row]:
    """A few rows that have every pair of values that any row has; those chosen among them."""
    rows = [*chosen, *random.Random(SEED).sample(every, len(every))]
    bits: dict[object, int] = {}
    masks = [sum(1 << bits.setdefault(pair, len(bits)) for pair in _pairs(row)) for row in rows]
    costs = [_cost(row) for row in rows]
    taken = list(range(len(chosen)))
    left = (1 << len(bits)) - 1
    for at in taken:
        left &= ~masks[at]
    while left:
        taken.append(
            max(range(len(rows)), key=lambda at: ((masks[at] & left).bit_count(), -costs[at]))
        )
        left &= ~masks[taken[-1]]
    return [rows[at] for at in taken]


def _pairs(row: ServerKind) -> Iterator[object]:
    return itertools.combinations(vars(row).items(), 2)


def _cost(row: ServerKind) -> int:
    return sum(costs.get(dict(vars(row)).get(name), 0) for name, costs in _COST.items())
