"""What was worked out from manifests, kept for as long as they say the same.

A trainer that connects anew offers the same boxes of the same regions, perhaps at other addresses:
then plans stay as they are but for the addresses. Columns are compared as they are; that is faster
than a digest of them, and certain.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.planning.plan_data import (
    FetchPlan,
    PackedBatch,
    PackedTable,
    StepRead,
)

__all__ = ["PlanCache", "rebased", "same_topology"]

T = TypeVar("T")

Addresses = npt.NDArray[np.uint64]


class PlanCache:
    """Plans and other findings of one topology at a time; another one drops them all."""

    def __init__(self) -> None:
        self._manifests: Sequence[SourceManifest] = ()
        self._plans: dict[Hashable, FetchPlan] = {}
        self._findings: dict[Hashable, object] = {}

    def plan(
        self, manifests: Sequence[SourceManifest], key: Hashable, make: Callable[[], FetchPlan]
    ) -> FetchPlan:
        """The plan for these manifests, made if there is none.

        Args:
            manifests: the sources, in the plan's order.
            key: everything else that the plan depends on.
            make: builds it from just these manifests.
        """
        self._meet(manifests)
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def finding(
        self, manifests: Sequence[SourceManifest], key: Hashable, make: Callable[[], T]
    ) -> T:
        """The same for what holds no address of the sources'."""
        self._meet(manifests)
        if key not in self._findings:
            self._findings[key] = make()
        return cast(T, self._findings[key])

    def clear(self) -> None:
        """Forget everything: something else that plans depend on has changed."""
        self._manifests = ()
        self._plans.clear()
        self._findings.clear()

    def _meet(self, manifests: Sequence[SourceManifest]) -> None:
        if manifests is self._manifests:
            return
        if not same_topology(self._manifests, manifests):
            self.clear()
        before = self._manifests
        moved = {key: rebased(plan, before, manifests) for key, plan in self._plans.items()}
        # All or nothing: plans of which some had moved would move once more the next time.
        self._plans, self._manifests = moved, manifests


def same_topology(known: Sequence[SourceManifest], other: Sequence[SourceManifest]) -> bool:
    """Whether manifests differ in nothing but who offers, and at which addresses."""
    return len(known) == len(other) and all(map(_alike, known, other))


def _alike(one: SourceManifest, other: SourceManifest) -> bool:
    return (
        (one.axes, one.transport, one.host, one.global_rank)
        == (other.axes, other.transport, other.host, other.global_rank)
        and one.regions.nbytes == other.regions.nbytes
        and one.regions.devices == other.regions.devices
        and one.boxes == other.boxes
        and one.tensors == other.tensors
    )


def rebased(
    plan: FetchPlan, known: Sequence[SourceManifest], other: Sequence[SourceManifest]
) -> FetchPlan:
    """A plan from `known` as it would be from `other`, of the same topology."""
    moves = [_Move(*sources) for sources in zip(known, other, strict=True)]
    if not any(move.by_bytes.any() for move in moves):
        return plan
    tables = {id(batch.table): batch.table for step in plan.steps for batch in step.packed}
    moved = {key: _moved_table(table, moves) for key, table in tables.items()}
    steps = [
        replace(
            step,
            reads=tuple(moves[read.source].read(read) for read in step.reads),
            packed=tuple(PackedBatch(moved[id(each.table)], each.rows) for each in step.packed),
        )
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))


class _Move:
    """How far each region of one source has moved."""

    def __init__(self, known: SourceManifest, other: SourceManifest) -> None:
        addresses = numbers(known.regions.addresses)
        order = np.lexsort((addresses, numbers(known.regions.devices)))
        devices = numbers(known.regions.devices)[order]
        self.by_bytes = (numbers(other.regions.addresses) - addresses)[order]
        self._devices = {
            device: (
                addresses[order][devices == device].astype(np.uint64),
                # Unsigned numbers wrap around: to add what -n wraps to is to take n away.
                self.by_bytes[devices == device].view(np.uint64),
            )
            for device in np.unique(devices).tolist()
        }

    def moved(self, device: int, addresses: Addresses) -> Addresses:
        """[n] addresses in regions of a device, where they are now."""
        begins, by_bytes = self._devices[device]
        region = np.searchsorted(begins, addresses, side="right") - 1
        there: Addresses = addresses + by_bytes[region]
        return there

    def read(self, read: StepRead) -> StepRead:
        """A read with its remote addresses moved."""
        table = read.descriptors.copy()
        table[:, 1] = self.moved(read.remote_device, table[:, 1])
        return replace(read, descriptors=table)


def _moved_table(table: PackedTable, moves: Sequence[_Move]) -> PackedTable:
    """Packed pieces with their remote addresses moved."""
    addresses = table.remote_address.copy()
    order = np.lexsort((table.remote_device, table.source))
    source, device = table.source[order], table.remote_device[order]
    changes = (source[1:] != source[:-1]) | (device[1:] != device[:-1])
    for rows in np.split(order, np.flatnonzero(changes) + 1):
        if len(rows):
            move = moves[int(table.source[rows[0]])]
            addresses[rows] = move.moved(int(table.remote_device[rows[0]]), addresses[rows])
    return replace(table, remote_address=addresses)
