"""One engine rank put together: its receiver over NIXL, its sleep, and the calls of an engine."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine_plugins.settings import Settings
from engine_plugins.sleep.memory_backend import MemoryBackend, MemoryTag
from engine_plugins.sleep.memory_ledger import MemoryLedger
from engine_plugins.sleep.rank_memory import RankMemory
from engine_plugins.sleep.rank_sleep import RankSleep
from engine_plugins.sleep.storages import storages
from engine_plugins.weights.hardware.machine import machine_id
from engine_plugins.weights.loader.weight_installer import WeightInstaller
from engine_plugins.weights.memory.kv_pages import clear_non_finite
from engine_plugins.weights.peers.agent_network import AgentNetwork
from engine_plugins.weights.planning.source_choice import Reader
from engine_plugins.weights.receiving.receiver import WeightReceiver
from engine_plugins.weights.receiving.worker_service import WorkerService, pull_page

__all__ = ["TaggedTensors", "make_rank_service"]

logger = logging.getLogger(__name__)

TaggedTensors = Mapping[MemoryTag, Callable[[], Iterable[torch.Tensor]]]
"""What lies in an engine rank's memory, by tag; asked anew each time."""


def make_rank_service(
    installer: WeightInstaller,
    memory: RankMemory,
    *,
    tp_size: int,
    settings: Settings,
    runtime_dir: Path | None,
    backend: MemoryBackend | None,
    tensors: TaggedTensors,
    calls: Mapping[str, Callable[..., Any]] | None = None,
) -> WorkerService:
    """The service of one engine rank; its NIXL agent is made when a plan first needs it.

    Args:
        installer: the engine's side of loading.
        memory: measures this rank, and names it.
        tp_size: how many ranks share the model.
        settings: of this server.
        runtime_dir: of this server; None where this process does not see it, as one that Ray
            started.
        backend: releases this rank's memory; None where nothing can.
        tensors: what lies in that memory, to say what a sleep leaves there.
        calls: further calls of an engine, by name; what they return must be plain data.
    """
    tp_rank = memory.tp_rank
    network = AgentNetwork(settings.net_devices)
    receiver = WeightReceiver(
        installer,
        lambda: network.open(_agent_name(tp_rank)),
        tp_rank=tp_rank,
        stall_timeout_s=settings.stall_timeout_s,
        direct_landing=settings.direct_landing,
        reader=Reader(
            policy=settings.source_policy,
            host=machine_id(),
            tp_rank=tp_rank,
            tp_size=tp_size,
        ),
        expected_link_gbps=settings.expected_link_gbps,
    )
    ledger = None if backend is None else MemoryLedger(backend)
    if ledger is not None:
        how = type(backend).__name__
        logger.info("rank %d can release %s, by %s", tp_rank, ", ".join(ledger.tags), how)
    sleep = RankSleep(ledger, memory, receiver, sizes=lambda tag: _size(tensors.get(tag)))
    return WorkerService(
        receiver,
        tp_rank=tp_rank,
        page=None if runtime_dir is None else pull_page(runtime_dir, tp_rank),
        calls={**sleep.calls, **(calls or {})},
        clear_kv=partial(_clear_kv, tensors, ledger),
        reach=network.reach,
    )


def _clear_kv(tensors: TaggedTensors, ledger: MemoryLedger | None, kept: bool) -> None:
    """See `clear_non_finite`. Memory that is released holds nothing, and cannot be read."""
    gone = () if ledger is None else (*ledger.released, *ledger.broken)
    if "kv_cache" not in gone and "kv_cache" in tensors:
        written = clear_non_finite(tensors["kv_cache"](), kept=kept)
        logger.debug("%d KV caches were zeroed", written)


def _size(tensors: Callable[[], Iterable[torch.Tensor]] | None) -> int:
    """Bytes of all storages, each once."""
    if tensors is None:
        return 0
    return sum(each.nbytes() for each in storages(tensors()))


def _agent_name(tp_rank: int) -> str:
    """One that no other agent has, of this process or any."""
    return f"engine-{socket.gethostname()}-{os.getpid()}-tp{tp_rank}-{secrets.token_hex(4)}"
