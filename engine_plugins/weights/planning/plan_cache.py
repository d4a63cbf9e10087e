"""What was worked out from manifests, kept for as long as they say the same.

A trainer that connects anew offers the same boxes of the same regions, perhaps at other addresses:
then plans stay as they are but for the addresses. Columns are compared as they are; that is faster
than a digest of them, and certain.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np

from engine_plugins.weights.contract.manifest import SourceManifest, numbers
from engine_plugins.weights.planning.plan import FetchPlan, PackedPiece, Step, StepRead

__all__ = ["PlanCache", "rebased", "same_topology"]

T = TypeVar("T")


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
        for key, plan in self._plans.items():
            self._plans[key] = rebased(plan, self._manifests, manifests)
        self._manifests = manifests


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
    return replace(plan, steps=tuple(_moved_step(step, moves) for step in plan.steps))


class _Move:
    """How far each region of one source has moved."""

    def __init__(self, known: SourceManifest, other: SourceManifest) -> None:
        addresses = numbers(known.regions.addresses)
        order = np.lexsort((addresses, numbers(known.regions.devices)))
        devices = numbers(known.regions.devices)[order]
        self.by_bytes = (numbers(other.regions.addresses) - addresses)[order]
        self._devices: dict[int, tuple[list[int], list[int]]] = {
            int(device): (
                addresses[order][devices == device].tolist(),
                self.by_bytes[devices == device].tolist(),
            )
            for device in np.unique(devices)
        }

    def read(self, read: StepRead) -> StepRead:
        """A read with its remote addresses moved."""
        begins, by_bytes = self._devices[read.remote_device]
        table = read.descriptors.copy()
        region = np.searchsorted(np.array(begins, np.uint64), table[:, 1], side="right") - 1
        # Unsigned numbers wrap around: to add what -n wraps to is to take n away.
        table[:, 1] += np.array(by_bytes, np.int64).view(np.uint64)[region]
        return replace(read, descriptors=table)

    def piece(self, piece: PackedPiece) -> PackedPiece:
        """Packed rows with their remote address moved."""
        begins, by_bytes = self._devices[piece.remote_device]
        region = bisect_right(begins, piece.remote_address) - 1
        return piece._replace(remote_address=piece.remote_address + by_bytes[region])


def _moved_step(step: Step, moves: Sequence[_Move]) -> Step:
    return replace(
        step,
        reads=tuple(moves[read.source].read(read) for read in step.reads),
        packed=tuple(
            tuple(moves[piece.source].piece(piece) for piece in batch) for batch in step.packed
        ),
    )
