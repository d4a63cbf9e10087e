"""One engine rank and the manifests of a large job: from files of bytes to a plan.

The manifests are of memory that is not there, and what the rank needs is cut by rule as its engine
would cut it: only reading and planning are measured. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine_plugins.weights.boxes.logical_tensor import LogicalTensor
from engine_plugins.weights.boxes.placement import Interval
from engine_plugins.weights.contract.manifest import (
    SourceManifest,
    decode_manifest,
    encode_manifest,
)
from engine_plugins.weights.contract.manifest_reader import ManifestReader
from engine_plugins.weights.planning.logical_tensors import logical_tensors
from engine_plugins.weights.planning.plan import build_plan, coalesced
from engine_plugins.weights.receiving.collector import collector_paused
from tests.support.engine_server import ROOT
from tests.support.model_shapes import ONE_TRILLION, QWEN3_30B_A3B, fused, logical_tensors_of
from tests.support.simulated_fsdp import simulated_fsdp
from tests.support.simulated_trainers import SimulatedJob

__all__ = ["CASES"]

T = TypeVar("T")

MOST_ENTRIES = 1 << 20
_ROWS = re.compile(r"(embed_tokens|lm_head|[qkv]_proj|[qk]v?_b_proj|gate_proj|up_proj)\.weight$")
_COLUMNS = re.compile(r"(o_proj|down_proj)\.weight$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A job and one of its engine's ranks."""

    model: str
    trainer: str
    engine: str
    tensors: Callable[[], list[LogicalTensor]]
    manifests: Callable[[list[LogicalTensor]], list[SourceManifest]]
    tp: int
    expert_parallel: bool = False


def _qwen() -> list[LogicalTensor]:
    return logical_tensors_of(QWEN3_30B_A3B)


CASES = {
    "fsdp-64": _Case(
        model="30B-A3B",
        trainer="64 FSDP2",
        engine="TP2, EP",
        tensors=_qwen,
        manifests=lambda tensors: simulated_fsdp(tensors, ranks=64),
        tp=2,
        expert_parallel=True,
    ),
    "fsdp-64-tp": _Case(
        model="30B-A3B",
        trainer="64 FSDP2",
        engine="TP2",
        tensors=_qwen,
        manifests=lambda tensors: simulated_fsdp(tensors, ranks=64),
        tp=2,
    ),
    "hsdp-64": _Case(
        model="30B-A3B",
        trainer="32 x 2 HSDP",
        engine="TP2",
        tensors=_qwen,
        manifests=lambda tensors: simulated_fsdp(tensors, ranks=32, replicas=2),
        tp=2,
    ),
    "fused-1024": _Case(
        model="30B-A3B, fused",
        trainer="1,024 FSDP2",
        engine="TP2",
        tensors=lambda: fused(_qwen()),
        manifests=lambda tensors: simulated_fsdp(tensors, ranks=1024),
        tp=2,
    ),
    "fused-1024-rows": _Case(
        model="30B-A3B, fused",
        trainer="1,024 FSDP2, axis 1",
        engine="TP2",
        tensors=lambda: fused(_qwen()),
        manifests=lambda tensors: simulated_fsdp(tensors, ranks=1024, axis=1),
        tp=2,
    ),
    "megatron-2048": _Case(
        model="1T",
        trainer="2,048 (TP8 PP16 EP32)",
        engine="1 of 128, EP",
        tensors=lambda: logical_tensors_of(ONE_TRILLION),
        manifests=lambda tensors: SimulatedJob(tensors, ranks=2048, tp=8, ep=32, pp=16).manifests(),
        tp=128,
        expert_parallel=True,
    ),
    "megatron-2048-tp8": _Case(
        model="1T",
        trainer="2,048 (TP8 PP16 EP32)",
        engine="TP8",
        tensors=lambda: logical_tensors_of(ONE_TRILLION),
        manifests=lambda tensors: SimulatedJob(tensors, ranks=2048, tp=8, ep=32, pp=16).manifests(),
        tp=8,
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path, help="only write the manifests into this folder")
    asked = parser.parse_args()
    case = CASES[asked.case]
    if asked.write:
        for number, manifest in enumerate(case.manifests(case.tensors())):
            (asked.write / f"{number:05}").write_bytes(encode_manifest(manifest))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what making them takes is no part of what reading them does.
        write = [sys.executable, "-m", "tests.benchmarks.plan_sources", "--write", folder]
        subprocess.run([*write, "--case", asked.case], cwd=ROOT, check=True)
        print(json.dumps(_measured(case, sorted(Path(folder).iterdir()), asked.runs)))


def _measured(case: _Case, files: Sequence[Path], runs: int) -> dict[str, Any]:
    before = _resident_mib()
    manifests, read_s = _median(lambda: _read(files), runs)
    held = _resident_mib() - before
    with collector_paused():  # as a receiver does
        agreed, agree_s = _median(lambda: logical_tensors(manifests), runs)
        steps, needed = _wanted(agreed, case.tp, expert_parallel=case.expert_parallel)
        plan, plan_s = _median(lambda: build_plan(manifests, coalesced(steps), needed), runs)
    _, check_s = _median(lambda: _checked(files), 1)
    return {
        "model": case.model,
        "trainer": case.trainer,
        "engine": case.engine,
        "tensors": len(agreed),
        "boxes": sum(manifest.box_count for manifest in manifests),
        "bytes": sum(path.stat().st_size for path in files),
        "check_s": check_s,
        "read_s": read_s,
        "agree_s": agree_s,
        "plan_s": plan_s,
        "held_mib": held,
        "operations": sum(step.operations for step in plan.steps),
    }


def _read(files: Sequence[Path]) -> list[SourceManifest]:
    reader = ManifestReader()
    return [reader.read(path.read_bytes()) for path in files]


def _checked(files: Sequence[Path]) -> None:
    for path in files:
        decode_manifest(path.read_bytes(), max_entries=MOST_ENTRIES)


def _wanted(
    tensors: Sequence[LogicalTensor], tp: int, *, expert_parallel: bool
) -> tuple[list[tuple[list[str], list[LogicalTensor]]], dict[str, list[Interval]]]:
    """Steps by module and the boxes of the first of `tp` ranks."""
    experts = 1 + max(
        (int(m[1]) for m in (_EXPERT.search(t.name) for t in tensors) if m), default=0
    )
    steps: dict[str, list[LogicalTensor]] = {}
    needed: dict[str, list[Interval]] = {}
    for tensor in tensors:
        expert = _EXPERT.search(tensor.name)
        if expert and expert_parallel:
            if int(expert[1]) * tp // experts:
                continue
            boxes = [((0,) * len(tensor.shape), tensor.shape)]
        else:
            boxes = _first_share(tensor, tp)
        needed[tensor.name] = boxes
        module = tensor.name.rpartition(".")[0].partition(".experts")[0]
        steps.setdefault(module, []).append(tensor)
    return [([module], wanted) for module, wanted in steps.items()], needed


def _first_share(tensor: LogicalTensor, tp: int) -> list[Interval]:
    """What the first of `tp` ranks wants of a tensor; of fused experts, gate and up apart."""
    shape = tensor.shape
    if tensor.name.endswith("gate_up_proj"):
        experts, rows, columns = shape
        share = (experts, rows // 2 // tp, columns)
        return [((0, first, 0), share) for first in (0, rows // 2)]
    first = (0,) * len(shape)
    if _COLUMNS.search(tensor.name) or tensor.name.endswith("down_proj"):
        return [(first, (*shape[:-1], shape[-1] // tp))]
    if _ROWS.search(tensor.name):
        return [(first, (shape[0] // tp, *shape[1:]))]
    return [(first, shape)]


def _median(work: Callable[[], T], runs: int) -> tuple[T, float]:
    """What work gives, and its processor seconds."""
    times: list[float] = []
    results: list[T] = []
    for _ in range(runs):
        results.clear()
        began = time.process_time()
        results.append(work())
        times.append(time.process_time() - began)
    return results[0], statistics.median(times)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
