"""What it costs to offer a large trainer's weights: from the leading rank, beside each rank itself.

The manifests are those of a 30B-A3B under FSDP2, the same each time; the server is the product's,
in a process of its own, over an engine that does nothing. *Collected* is what the ranks need to
bring their manifests to the leading one, as processes of a gloo group on this machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import uvicorn
from rich.table import Table

from engine_plugins.admin.shared_state import create_runtime_dir
from engine_plugins.admin_client import AdminClient
from engine_plugins.errors import EnginePluginError
from engine_plugins.sender.rank_wire import Buffer
from engine_plugins.sender.ranks import BATCH_BYTES, TrainerRanks
from engine_plugins.weights.contract.manifest import encode_manifest
from engine_plugins.weights.contract.manifest_batch import pack_manifest
from tests.support.admin_server import TOKEN, AdminServer
from tests.support.engine_server import free_port
from tests.support.model_shapes import logical_tensors_of
from tests.support.qwen3_30b import CONFIG
from tests.support.simulated_fsdp import simulated_fsdp

__all__ = ["publishing"]

RANKS = (1, 64)
FORKS = multiprocessing.get_context("fork")


def publishing(*, runs: int) -> Table:
    """One row for each number of ranks; seconds, medians of interleaved runs."""
    table = Table(title="Publishing the manifests of a 30B-A3B under FSDP2 to one engine; seconds")
    for column in (
        "ranks",
        "MB of manifests",
        "MB sent",
        "packed on one rank",
        "collected",
        "published in batches",
        "one call each (ratio)",
    ):
        table.add_column(column, justify="right")
    for ranks in RANKS:
        table.add_row(*_measured(ranks, runs))
    return table


def _measured(ranks: int, runs: int) -> list[str]:
    manifests = simulated_fsdp(logical_tensors_of(CONFIG), ranks=ranks)
    plain = [encode_manifest(manifest) for manifest in manifests]
    packing = [_seconds(lambda: pack_manifest(plain[0])) for _ in range(runs)]
    packed = [pack_manifest(each) for each in plain]
    batched, single = [], []
    with _server() as url, AdminClient(url, token=TOKEN) as client:
        client.put_sources(packed[:1])  # the connection
        for _ in range(runs):
            batched.append(_seconds(lambda: [client.put_sources(b) for b in _batches(packed)]))
            single.append(_seconds(lambda: [client.put_source(each) for each in plain]))
    collected = _collected(packed, runs) if ranks > 1 else 0.0
    middle = statistics.median(batched)
    return [
        str(ranks),
        f"{sum(map(len, plain)) / 1e6:.1f}",
        f"{sum(map(len, packed)) / 1e6:.1f}",
        f"{statistics.median(packing):.3f}",
        f"{collected:.3f}",
        f"{middle:.3f}",
        f"{statistics.median(single):.3f} ({statistics.median(single) / middle:.2f})",
    ]


def _batches(packed: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for each in packed:
        if batch and sum(map(len, batch)) + len(each) > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(each)
    yield batch


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextmanager
def _server() -> Iterator[str]:
    """The url of a server over an engine that does nothing."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = FORKS.Process(target=_serve, args=(Path(folder) / "runtime", port), daemon=True)
        process.start()
        url = f"http://127.0.0.1:{port}"
        try:
            with AdminClient(url, token=TOKEN) as client:
                _until_it_answers(client)
            yield url
        finally:
            process.kill()
            process.join()


def _until_it_answers(client: AdminClient) -> None:
    for _ in range(200):
        try:
            client.weights()
        except EnginePluginError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the server did not start")


def _serve(runtime_dir: Path, port: int) -> None:
    create_runtime_dir(runtime_dir)
    app = AdminServer(runtime_dir).app
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def _collected(packed: Sequence[bytes], runs: int) -> float:
    """Seconds until the leading one of so many processes has had all, the median."""
    told: Any = FORKS.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            FORKS.Process(target=_collect, args=(rank, packed, folder, runs, told), daemon=True)
            for rank in range(len(packed))
        ]
        for rank in ranks:
            rank.start()
        try:
            return statistics.median(told.get(timeout=600))
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _collect(rank: int, packed: Sequence[bytes], folder: str, runs: int, told: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=len(packed)
    )
    ranks = TrainerRanks(meet_timeout_s=300.0)
    seen: list[float] = []
    for _ in range(runs):
        ranks.agree("beginning", lambda: None, None)
        seen.append(
            _seconds(lambda: ranks.collect("publishing", lambda: packed[rank], _take, most=4096))
        )
    if ranks.leads:
        told.put(seen)
    time.sleep(600)


def _take(packed: Mapping[int, Buffer]) -> None:
    pass
