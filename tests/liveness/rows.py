"""The rows: a server, a stuck state, and where in an update it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.chaos_update.cases import Case, ServerKind

__all__ = ["PREPARED_S", "TIMEOUT_S", "Row", "SteppingKind", "rows"]

TIMEOUT_S = 6.0
"""Of the update that is hurt."""
PREPARED_S = 60.0
"""Of one that is prepared by a trainer who dies: others are not kept out for all of it."""

_STILL = ("worker_stopped", "worker_killed", "core_stopped", "core_killed", "api_killed")
_STARVED = ("disk_full", "no_descriptors", "folder_deleted")
UNHEARD = ("hold", "drain")
"""Of a held pause the answer is there already; who drains is killed with the answer."""
LONG_ERROR = "long_error"


@dataclass(frozen=True, kw_only=True)
class SteppingKind(ServerKind):
    """A server whose installs can be told to fail."""


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """One stuck state.

    Attributes:
        timeout_s: of the update.
    """

    timeout_s: float = TIMEOUT_S

    @property
    def ends_server(self) -> bool:
        """Whether the server has to end: what cannot be replaced is killed in it."""
        if self.fault == "api_killed":
            return self.engine == "vllm" or self.api_servers == 1
        return self.kills or "terminated" in self.fault

    @property
    def is_quiet(self) -> bool:
        """Whether nobody asks: a server that is told to end first answers whoever asks."""
        return "terminated" in self.fault

    @property
    def tells(self) -> bool:
        """Whether a trainer waits to be told."""
        before = self.ends_server and self.phase == "before"
        return self.fault != "trainer_killed" and not before and self.phase not in UNHEARD

    @property
    def server(self) -> ServerKind:
        """The server that it needs."""
        kind = SteppingKind if self.stepping else ServerKind
        return kind(**{name: getattr(self, name) for name in ServerKind.__annotations__})

    @property
    def stepping(self) -> bool:
        """Whether its server's installs can be told to fail."""
        return self.fault == LONG_ERROR


def rows(engine: str) -> list[Row]:
    """All rows of an engine: those of one server together, those that end it last."""
    one = _row(engine)
    two_ranks, two_apis = replace(one, tensor_parallel=2), replace(one, api_servers=2)
    found = [
        *_at(one, "trainer_killed", "pull", "prepared"),
        *_at(one, "disk_full", "before", "pull", "install"),
        *_at(one, "no_descriptors", "pull", "install"),
        *_at(one, "folder_deleted", "pull", "install"),
        *_at(one, "core_stopped", "pull", "install", "prepared"),
        *_at(one, "core_killed", "pull", "pause", "install", "prepared"),
        *_at(one, "api_killed", "pull", "install", "prepared"),
        *_at(one, "terminated", "before", "install"),
        *_at(one, "group_terminated", "before"),
        *_at(two_ranks, "worker_stopped", "pull", "pause", "install", "prepared"),
        *_at(two_ranks, "worker_stopped", "sleep", "wake"),
        *_at(one, "core_stopped", "sleep"),
        *_at(one, "no_room_to_sleep", "sleep"),
        *_at(two_ranks, "worker_killed", "pull", "pause", "install", "prepared"),
        *_at(two_apis, "core_stopped", "install"),
        *_at(two_apis, "disk_full", "install"),
        *_at(two_apis, "core_killed", "pull", "install"),
        *_at(two_apis, "api_killed", "pull", "install", "prepared"),
        *_at(two_apis, "terminated", "before"),
        *_at(one, LONG_ERROR, "install"),
    ]
    if engine == "vllm":  # SGLang's scheduler of one rank is its worker
        found += _at(one, "worker_stopped", "pull", "install")
        found += _at(one, "worker_killed", "pull", "install")
    else:  # whose server goes on without that process
        found += _at(two_apis, "api_killed", *UNHEARD)
    servers = list(dict.fromkeys(row.server for row in found))
    return sorted(found, key=lambda row: (servers.index(row.server), row.ends_server))


def _row(engine: str) -> Row:
    return Row(
        engine=engine,
        tensor_parallel=1,
        api_servers=1,
        wire="tcp",
        dtype="bfloat16",
        mode="staged",
        commit="one",
        phase="pull",
        fault="",
    )


def _at(row: Row, fault: str, *phases: str) -> Iterator[Row]:
    """The same at several phases; in an install live parameters are half new."""
    for phase in phases:
        waits = fault == "trainer_killed" and phase == "prepared"
        yield replace(
            row,
            fault=fault,
            phase=phase,
            mode="in_place" if phase == "install" else "staged",
            commit="two" if phase == "prepared" else "one",
            timeout_s=PREPARED_S if waits else TIMEOUT_S,
        )
