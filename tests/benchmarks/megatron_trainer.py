"""A Megatron-Core trainer of two tensor-parallel ranks on the CPU, loaded by Megatron-Bridge.

Both ranks hold the live model and answer requests: export it through Bridge's public API, or
offer it where it lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine_plugins.weights.sources.megatron.source import MegatronRank, megatron_boxes
from engine_plugins.weights.sources.source import WeightSource
from engine_plugins.weights.transport.nixl import NixlTransport

__all__ = ["TP_SIZE", "MegatronTrainer", "tensor_digests", "transport_over"]

TP_SIZE = 2
ANSWER_S = 300.0


def transport_over(wires: str | None, name: str) -> NixlTransport:
    """An agent that UCX lets use these wires; None for its own choice."""
    os.environ.pop("UCX_TLS", None)
    if wires is not None:
        os.environ["UCX_TLS"] = wires
    return NixlTransport(name)


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """A digest of each tensor's bytes."""
    return {
        name: hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().data).digest()
        for name, tensor in tensors.items()
    }


class MegatronTrainer:
    """The ranks' processes, seen from the one that measures.

    Args:
        fork: makes a process that begins with what is imported here, Bridge included.
        folder: a checkpoint in HF's form.
    """

    def __init__(self, fork: Callable[..., BaseProcess], folder: Path) -> None:
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(TP_SIZE):
            link, theirs = Pipe()
            process = fork(target=_serve, args=(rank, theirs, folder), daemon=True)
            process.start()
            theirs.close()
            self._links.append(link)
            self._processes.append(process)

    def ask(self, request: str, *arguments: object) -> list[Any]:
        """Every rank's answer to a request, which all of them work on at once."""
        for link in self._links:
            link.send((request, *arguments))
        for link, process in zip(self._links, self._processes, strict=True):
            if not link.poll(ANSWER_S):
                raise RuntimeError(f"{process.name}: no answer to {request!r}")
        return [link.recv() for link in self._links]

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
        for process, link in zip(self._processes, self._links, strict=True):
            process.join(10)
            link.close()


class _Rank:
    """One rank; each public method answers the request of its name."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._rank = rank
        self._config = json.loads((folder / "config.json").read_text())
        self._bridge, self._chunks = _live_model(rank, folder)
        self._tasks = self._bridge.get_conversion_tasks(self._chunks)
        self._exported: dict[str, torch.Tensor] = {}
        self._source: WeightSource | None = None
        self._transports: dict[str | None, NixlTransport] = {}

    def ready(self) -> None:
        """Answer once the model is loaded."""

    def export(self) -> float:
        """Export by Bridge into whole HF tensors; seconds on this rank."""
        self._exported = {}
        dist.barrier()
        began = time.perf_counter()
        self._exported = dict(
            self._bridge.export_hf_weights(
                self._chunks, cpu=True, show_progress=False, conversion_tasks=self._tasks
            )
        )
        return time.perf_counter() - began

    def digests(self) -> dict[str, bytes]:
        """Digests of what the last export gave."""
        return tensor_digests(self._exported)

    def offer(self, wires: str | None) -> bytes:
        """Describe the shards where they lie, and register them; the manifest."""
        self.withdraw()
        if wires not in self._transports:
            name = f"megatron-{self._rank}-{secrets.token_hex(4)}"
            self._transports[wires] = transport_over(wires, name)
        shards = MegatronRank.from_model(self._chunks)
        self._source = WeightSource(
            lambda: megatron_boxes(shards, self._config),
            self._transports[wires],
            source=shards.label,
        )
        return self._source.manifest_bytes

    def refresh(self) -> None:
        """What a sender does before each update: see whether anything moved."""
        if self._source is not None:
            self._source.refresh()

    def withdraw(self) -> None:
        """Take the offer back."""
        if self._source is not None:
            self._source.close()
            self._source = None


def _serve(rank: int, link: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    served = _Rank(rank, folder)
    while True:
        try:
            request, *arguments = link.recv()
        except EOFError:
            return
        link.send(getattr(served, request)(*arguments))


def _live_model(rank: int, folder: Path) -> tuple[Any, Sequence[torch.nn.Module]]:
    """Bridge and the model chunks of this rank, as Bridge's documentation has it, on the CPU."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    _patch_for_cpu()
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=TP_SIZE)
    bridge = AutoBridge.from_hf_pretrained(str(folder), torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = TP_SIZE
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = torch.float32
    provider.bf16 = provider.fp16 = False
    provider.use_cpu_initialization, provider.perform_initialization = True, False
    for fusion in (
        "gradient_accumulation_fusion",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "persist_layer_norm",
        "cross_entropy_loss_fusion",
    ):
        setattr(provider, fusion, False)
    provider.finalize()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP_SIZE)
    chunks = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, mixed_precision_wrapper=None
    )
    bridge.load_hf_weights(chunks)
    return bridge, chunks


def _patch_for_cpu() -> None:
    """Two things that Bridge gets from CUDA: a device, and contiguous pieces to scatter.

    On a GPU its copy to the device makes the pieces contiguous; gloo reads others wrongly.
    """
    scatter = dist.scatter

    def contiguous(target: torch.Tensor, pieces: list[torch.Tensor] | None, **rest: Any) -> Any:
        laid_out = None if pieces is None else [piece.contiguous() for piece in pieces]
        return scatter(target, laid_out, **rest)

    setattr(dist, "scatter", contiguous)  # noqa: B010
    setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # noqa: B010
