"""How long the API's event loop is held while a large trainer publishes and connects.

The server's own service, without its HTTP, over an engine whose workers only say that they are
here. A ticker sleeps for 5 ms at a time; what it comes late is what every request would wait. On a
busy machine it is late for want of a processor too: *held* is how late it was at most by what this
process computed meanwhile.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from rich.table import Table

from engine_plugins.admin.schemas import ConnectBody
from engine_plugins.admin.service import AdminService
from engine_plugins.admin.shared_state import SharedState, create_runtime_dir
from engine_plugins.settings import Settings
from engine_plugins.weights.contract.manifest import MSGPACK, encode_manifest
from engine_plugins.weights.contract.report import RankPlan
from engine_plugins.weights.receiving.worker_messages import ConnectAnswer, WorkerDescription
from tests.support.in_memory_engine import InMemoryEngine
from tests.support.model_shapes import ONE_TRILLION, logical_tensors_of
from tests.support.simulated_trainers import SimulatedJob

__all__ = ["event_loop"]

T = TypeVar("T")

TICK_S = 0.005
WORKERS = 128


def event_loop() -> Table:
    """The longest that the loop was held, of 1T-parameter manifests and of one whole model's."""
    tensors = logical_tensors_of(ONE_TRILLION)
    table = Table(title="The API's event loop while a trainer publishes and connects")
    for column in ("manifests", "bytes of one", "MB in all", "idle", "publishing", "connecting"):
        table.add_column(column, justify="right")
    for ranks, tp, ep in ((256, 8, 32), (1, 1, 1)):
        job = SimulatedJob(tensors, ranks=ranks, tp=tp, ep=ep)
        bodies = [encode_manifest(manifest) for manifest in job.manifests()]
        with tempfile.TemporaryDirectory() as folder:
            late = asyncio.run(_late(Path(folder) / "runtime", bodies))
        table.add_row(
            str(ranks),
            f"{max(map(len, bodies)):,}",
            f"{sum(map(len, bodies)) / 1e6:.0f}",
            *(f"{each.late * 1e3:.0f} ms, held {each.held * 1e3:.0f}" for each in late),
        )
    return table


class Delay(NamedTuple):
    """The ticker's longest, in seconds."""

    late: float
    held: float


class _Answering(InMemoryEngine):
    """An engine of many workers, which do nothing; their answers are made beforehand."""

    def __init__(self) -> None:
        super().__init__(tp_size=1, generation=lambda: None)
        ranks = range(WORKERS)
        self._answers: dict[str, Sequence[object]] = {
            "describe": [
                WorkerDescription(tp_rank=rank, pid=1, host=socket.gethostname()) for rank in ranks
            ],
            "connect": [_connected(rank) for rank in ranks],
        }

    async def call_workers(self, call: str, arguments: bytes) -> list[bytes]:
        return [
            msgspec.msgpack.encode({"value": answer, "failure": None})
            for answer in self._answers[call]
        ]


def _connected(rank: int) -> ConnectAnswer:
    numbers = [field.name for field in msgspec.structs.fields(RankPlan) if field.type is int]
    plan = msgspec.convert(dict.fromkeys(numbers, 0) | {"tp_rank": rank}, RankPlan)
    return ConnectAnswer(plan=plan, unused=[], plan_s=0.0, connect_s=0.0)


async def _late(runtime_dir: Path, bodies: Sequence[bytes]) -> list[Delay]:
    """With nothing to do, while all manifests come at once, and while connecting."""
    create_runtime_dir(runtime_dir)
    settings = Settings(admin_token="unused")
    service = AdminService(_Answering(), SharedState(runtime_dir), settings)
    idle, _ = await _ticked(asyncio.sleep(2.0))
    publishing, ids = await _ticked(
        asyncio.gather(*(service.add_source(body, MSGPACK) for body in bodies))
    )
    connecting, _ = await _ticked(service.connect(ConnectBody(source_ids=list(ids))))
    return [idle, publishing, connecting]


async def _ticked(work: Awaitable[T]) -> tuple[Delay, T]:
    """The longest delay of a ticker while work goes on, and what it gives."""
    late = held = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        began, computed = time.perf_counter(), time.process_time()
        await asyncio.sleep(TICK_S)
        over = time.perf_counter() - began - TICK_S
        late = max(late, over)
        held = max(held, min(over, time.process_time() - computed))
    return Delay(late, held), await task
