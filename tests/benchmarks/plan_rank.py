"""One rank of a real engine and a simulated trainer: how long it takes to know what to read.

Run in the environment of either engine. The engine's loader is the real one, over the model's
class with parameters without memory; of the trainer there are manifests only. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.contract.manifest import SourceManifest, encode_manifest
from engine_plugins.weights.contract.manifest_reader import ManifestReader
from engine_plugins.weights.loader.coverage import engine_steps
from engine_plugins.weights.loader.loader_trace import LoaderTrace
from engine_plugins.weights.loader.needed import needed_boxes
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan, coalesced
from engine_plugins.weights.planning.plan_cache import PlanCache
from engine_plugins.weights.planning.plan_data import FetchPlan
from engine_plugins.weights.receiving.collector import collector_paused
from tests.support.loader_maps import PlayedRank, played_engine
from tests.support.model_shapes import ONE_TRILLION, QWEN3_30B_A3B, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

T = TypeVar("T")

SHAPES = {"30b": QWEN3_30B_A3B, "1t": ONE_TRILLION}
RUNS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--trainer", type=int, nargs=3, metavar=("RANKS", "TP", "EP"))
    parser.add_argument("--runs", type=int, default=RUNS)
    asked = parser.parse_args()
    # Engines print what they like; the one line of ours goes where standard output was.
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    config = dict(SHAPES[asked.shape])
    config["num_hidden_layers"] = asked.layers or config["num_hidden_layers"]
    tensors = logical_tensors_of(config, torch.float32)  # as the engines are played
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with (
            played_engine() as engine,
            engine.rank(
                Path(folder),
                tp_size=asked.tp,
                tp_rank=0,
                expert_parallel=asked.expert_parallel,
            ) as rank,
        ):
            found = {"engine": engine.kind} | _measured(rank, tensors, asked)
    print(json.dumps(found), file=out, flush=True)


def _measured(
    rank: PlayedRank, tensors: list[LogicalTensor], asked: argparse.Namespace
) -> dict[str, Any]:
    ranks, tp, ep = asked.trainer
    with collector_paused():  # as a receiver does
        trace, trace_s = _median(lambda: rank.trace(tensors), max(asked.runs // 2, 1))
        _, bare_s = _median(lambda: _load_alone(rank, tensors), max(asked.runs // 2, 1))
    offers = _offers(tensors, asked.trainer)
    bodies = [encode_manifest(offer) for offer in offers]
    read, decode_s = _median(lambda: list(map(ManifestReader().read, bodies)), 1)
    agreed, agree_s = _median(lambda: logical_tensors(read), 1)
    (steps, needed), group_s = _median(lambda: _wanted(rank, trace, agreed), 1)

    def plan(manifests: list[SourceManifest]) -> FetchPlan:
        return build_plan(manifests, coalesced(steps), needed)

    with collector_paused():
        made, plan_s = _median(lambda: plan(offers), asked.runs)
    tracemalloc.start()
    plan(offers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    again, moved = _offers(tensors, asked.trainer), _offers(tensors, asked.trainer, 1 << 41)
    return {
        "tensors": len(tensors),
        "trainer": f"{ranks} (TP{tp} EP{ep})",
        "trace_s": trace_s,
        "bare_s": bare_s,
        "agree_s": agree_s + decode_s,
        "group_s": group_s,
        "plan_s": plan_s,
        "same_s": _cached(plan, offers, again, asked.runs),
        "moved_s": _cached(plan, offers, moved, asked.runs),
        "peak_mib": peak / 2**20,
        "operations": sum(step.operations for step in made.steps),
        "manifest_bytes": max(map(len, bodies)),
    }


def _load_alone(rank: PlayedRank, tensors: list[LogicalTensor]) -> None:
    """The same model built and the same placeholders loaded, with nobody looking."""
    module = sys.modules[type(rank.rules).__module__]
    watched = module.trace_loader

    def alone(
        parameters: Any, load: Callable[[Any], object], tensors: list[LogicalTensor]
    ) -> LoaderTrace:
        load((t.name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for t in tensors)
        return LoaderTrace(copies=(), parameter_numel=dict.fromkeys(parameters, 0))

    module.trace_loader = alone  # type: ignore[attr-defined]
    try:
        rank.trace(tensors)
    finally:
        module.trace_loader = watched  # type: ignore[attr-defined]


def _wanted(rank: PlayedRank, trace: LoaderTrace, tensors: list[LogicalTensor]) -> Any:
    return engine_steps(trace, tensors, rank.rules)[0], needed_boxes(trace, tensors)


def _offers(
    tensors: list[LogicalTensor], trainer: tuple[int, int, int], address: int = 1 << 40
) -> list[SourceManifest]:
    ranks, tp, ep = trainer
    return SimulatedJob(tensors, ranks=ranks, tp=tp, ep=ep, region_address=address).manifests()


def _cached(
    make: Callable[[list[SourceManifest]], FetchPlan],
    first: list[SourceManifest],
    second: list[SourceManifest],
    runs: int,
) -> float:
    """Seconds for the plan of a second connection, when the first one's is kept."""
    plan = make(first)
    times: list[float] = []
    for _ in range(runs):
        cache = PlanCache()
        cache.plan(first, "pull", lambda: plan)
        began = time.thread_time()
        cache.plan(second, "pull", lambda: make(second))
        times.append(time.thread_time() - began)
    return statistics.median(times)


def _median(work: Callable[[], T], runs: int) -> tuple[T, float]:
    """What work gives, and its processor seconds: other work on the machine counts little."""
    times: list[float] = []
    results: list[T] = []
    for _ in range(runs):
        began = time.thread_time()
        results = [work()]
        times.append(time.thread_time() - began)
    return results[0], statistics.median(times)


if __name__ == "__main__":
    main()
