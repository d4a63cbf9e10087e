"""What an engine rank would hold after a fetch: manifest, plan and reads, all of them real."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from engine_plugins.weights.boxes.placement import Interval, SourceBox
from engine_plugins.weights.contract.manifest import (
    SourceManifest,
    decode_manifest,
    encode_manifest,
)
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan
from engine_plugins.weights.receiving.prepared_fetch import PreparedFetch
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.in_memory import InMemoryTransport
from tests.support.source_ranks import offered_boxes

__all__ = ["fetched", "fetched_from"]


def fetched(
    ranks: Sequence[Sequence[SourceBox]],
    needed: Mapping[str, Sequence[Interval]] | None = None,
) -> dict[str, torch.Tensor]:
    """Offer each rank's boxes as a process of its own, and fetch every tensor that they name.

    The manifests travel as bytes; the tensors are put together by a plan's reads alone. Of a tensor
    that `needed` has boxes for, these are fetched.
    """
    engine = InMemoryTransport("engine-0")
    with offered_boxes(*(boxes for boxes in ranks if boxes)) as made:
        try:
            manifests = [
                decode_manifest(encode_manifest(rank.manifest), max_entries=100_000)
                for rank in made
            ]
            return fetched_from(manifests, engine, needed)
        finally:
            engine.close()


def fetched_from(
    manifests: Sequence[SourceManifest],
    engine: Transport,
    needed: Mapping[str, Sequence[Interval]] | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor that some manifests name, or boxes of it, over the transport of an engine."""
    steps = [([tensor.name], [tensor]) for tensor in logical_tensors(manifests)]
    fetch = PreparedFetch(build_plan(manifests, steps, needed), manifests, engine, staged=True)
    try:
        fetch.run_steps(
            range(len(steps)),
            stall_timeout_s=30.0,
            deadline=time.monotonic() + 60.0,
            cancelled=lambda: False,
        )
        return {
            name: view.clone() for index in range(len(steps)) for name, view in fetch.tensors(index)
        }
    finally:
        fetch.close()
