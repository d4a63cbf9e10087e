"""How much of the wire the receiver gets: our pull beside one raw prepared NIXL read.

256 MiB as 400 tensors, shaped as a dense transformer's. Raw: every byte in a single prepared
transfer into one buffer, spun on until done. Ours: the receiver's own fetch, module by module
into its bounded arena (in place) or into one that holds them all (staged, the fairer pair: raw's
buffer is as large). Wire seconds only, the same transport class and settings on both sides.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from engine_plugins.weights.arena import Arena
from engine_plugins.weights.coverage import EngineStep
from engine_plugins.weights.manifest import SourceManifest
from engine_plugins.weights.plan import build_plan, coalesced, logical_tensors
from engine_plugins.weights.prepared_fetch import PreparedFetch
from engine_plugins.weights.transport.base import Transport
from engine_plugins.weights.transport.nixl import NixlTransport
from tests.support.trainer_process import trainer_process

LAYERS = 36
MODEL_BYTES = 256 << 20
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
PARTS = {
    "q_proj": 4,
    "k_proj": 1,
    "v_proj": 1,
    "o_proj": 4,
    "gate_proj": 10,
    "up_proj": 10,
    "down_proj": 10,
}
"""Relative sizes of a layer's matrices; its four norms are small."""


def wire_share(folder: Path, *, pairs: int) -> Table:
    """A table of raw and ours, for CMA (UCX's own choice on one host) and for tcp."""
    tensors = _tensors()
    save_file(tensors, folder / "model.safetensors")
    table = Table(title=f"pull of {MODEL_BYTES >> 20} MiB as {len(tensors)} tensors, {pairs} pairs")
    for column in ("UCX_TLS", "mode", "raw GB/s", "ours GB/s", "ours / raw", "spread", "arena"):
        table.add_column(column, justify="right")
    for wires in (None, "tcp"):
        for staged in (False, True):
            mode = "staged" if staged else "in place"
            row = _measure(folder, wires, pairs, staged=staged)
            table.add_row(wires or "unset (CMA)", mode, *row)
    return table


def _tensors() -> dict[str, torch.Tensor]:
    unit = MODEL_BYTES // 4 // (LAYERS * sum(PARTS.values()) + 80)
    generator = torch.Generator().manual_seed(0)

    def filled(numel: int) -> torch.Tensor:
        return torch.rand(numel, generator=generator)

    tensors = {"embed": filled(40 * unit), "head": filled(40 * unit)}
    for layer in range(LAYERS):
        for name, parts in PARTS.items():
            tensors[f"{layer}.{name}"] = filled(parts * unit)
        for norm in ("q_norm", "k_norm", "input_norm", "post_norm"):
            tensors[f"{layer}.{norm}"] = filled(128)
    tensors["norm"], tensors["rope"] = filled(128), filled(128)
    return tensors


def _measure(folder: Path, wires: str | None, pairs: int, *, staged: bool) -> list[str]:
    os.environ.pop("UCX_TLS", None)
    if wires is not None:
        os.environ["UCX_TLS"] = wires
    transport = NixlTransport(f"bench-{os.getpid()}-{secrets.token_hex(3)}")
    with trainer_process(folder) as trainer:
        manifest = msgspec.msgpack.decode(trainer.manifest, type=SourceManifest)
        raw, ours = _raw(transport, manifest), _ours(transport, manifest, staged=staged)
        for warm in (raw[0], ours[0]):
            warm()
        seconds = [(raw[0](), ours[0]()) for _ in range(pairs)]
        ratios = sorted(first / second for first, second in seconds)
        row = [
            f"{MODEL_BYTES / 1e9 / statistics.median(first for first, _ in seconds):.2f}",
            f"{MODEL_BYTES / 1e9 / statistics.median(second for _, second in seconds):.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
            ours[1],
        ]
        for close in (raw[1], ours[2]):
            close()
    transport.close()
    return row


def _raw(
    transport: Transport, manifest: SourceManifest
) -> tuple[Callable[[], float], Callable[[], None]]:
    transport.add_peer(manifest.agent, manifest.agent_metadata)
    arena = Arena(sum(manifest.regions.nbytes), transport)
    rows = np.empty((len(manifest.regions.nbytes), 3), dtype=np.uint64)
    lengths = np.array(manifest.regions.nbytes, dtype=np.uint64)
    rows[:, 0] = arena.address + np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint64)
    rows[:, 1], rows[:, 2] = manifest.regions.addresses, lengths
    read = transport.prepare_read(manifest.agent, rows, local_device=-1, remote_device=-1)

    def run() -> float:
        began = time.perf_counter()
        read.post()
        while not read.done():
            time.sleep(0)
        return time.perf_counter() - began

    def close() -> None:
        read.release()
        arena.close()

    return run, close


def _ours(
    transport: Transport, manifest: SourceManifest, *, staged: bool
) -> tuple[Callable[[], float], str, Callable[[], None]]:
    steps: dict[str, EngineStep] = {}
    for tensor in logical_tensors([manifest]):
        layer, _, part = tensor.name.rpartition(".")
        module = f"{layer}.{FUSED.get(part, part)}"
        steps.setdefault(module, ([module], []))[1].append(tensor)
    plan = build_plan([manifest], coalesced(list(steps.values())))
    fetch = PreparedFetch(plan, [manifest], transport, staged=staged)

    def run() -> float:
        fetch.reset_counters()
        deadline = time.monotonic() + 120
        done = 0
        while done < len(plan.steps):
            steps = fetch.steps_with_room(done, installed=done)
            fetch.run_steps(steps, stall_timeout_s=60, deadline=deadline, cancelled=lambda: False)
            done = steps.stop
        return fetch.wire_s

    return run, f"{fetch.arena_bytes / (1 << 20):.0f} MiB", fetch.close
