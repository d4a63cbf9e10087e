"""The plans that an engine holds, as every process of its server finds them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine_plugins.admin.shared_state import SharedState
from engine_plugins.errors import UnknownIdError
from engine_plugins.weights.contract.report import PlanSummary

__all__ = ["Plans"]

MAX_PLANS = 8
_MOST_BYTES = 24 << 10
"""Of one plan; the ranks of a larger one are left out, and its totals stay."""


class _Kept(msgspec.Struct, array_like=True):
    plan: PlanSummary
    used: bool = False


_KEPT = msgspec.msgpack.Decoder(list[_Kept])


class Plans:
    """The newest plans; they need no file, so an update from one needs none either."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared

    def listed(self) -> list[PlanSummary]:
        """Every plan, oldest first."""
        return [each.plan for each in _read(self._shared.kept("plans"))]

    def get(self, plan_id: str) -> PlanSummary:
        """A plan; connecting and planning count for its first update alone.

        Raises:
            UnknownIdError: it is not here.
        """
        for each in _read(self._shared.kept("plans")):
            if each.plan.plan_id == plan_id:
                once = {"connect_s": 0.0, "plan_s": 0.0} if each.used else {}
                return msgspec.structs.replace(each.plan, **once)
        raise UnknownIdError(f"no plan {plan_id[:80]!r} here", remedy="connect again")

    def add(self, plan: PlanSummary) -> Sequence[str]:
        """Keep a plan; the ids of those that make room for it."""
        plan = msgspec.structs.replace(plan, destinations=[])
        if len(msgspec.msgpack.encode(plan)) > _MOST_BYTES:
            plan = msgspec.structs.replace(plan, ranks=[])
        dropped: list[str] = []

        def change(body: bytes) -> bytes:
            kept = [*_read(body), _Kept(plan)]
            dropped.extend(each.plan.plan_id for each in kept[:-MAX_PLANS])
            return msgspec.msgpack.encode(kept[-MAX_PLANS:])

        self._shared.revise("plans", change)
        return dropped

    def use(self, plan_id: str) -> None:
        """Remember that an update from it has begun."""

        def change(body: bytes) -> bytes:
            kept = _read(body)
            for each in kept:
                each.used = each.used or each.plan.plan_id == plan_id
            return msgspec.msgpack.encode(kept)

        self._shared.revise("plans", change)


def _read(body: bytes) -> list[_Kept]:
    return _KEPT.decode(body) if body else []
