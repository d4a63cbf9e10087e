"""ModelExpress's own receive path, in a process of its own, asked for one pull at a time.

Its reshard receiver hands a list of ranges to `NixlReshardTransport.read`, for every update anew;
that call is what is timed, with the list made beforehand as the receiver caches it. Its agent
polls without a pause, also when idle, which would take one of two cores from whoever is measured
beside it: between its turns the process is stopped.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_plugins.weights.transport.base import Descriptors
from tests.benchmarks.clock import Clock, Cost
from tests.support.forked_process import ForkedProcess

__all__ = ["ModelExpressRank"]

READY_S = 120.0
SESSION = "trainer"


class ModelExpressRank:
    """A ModelExpress receiver that pulls the same ranges of the same trainer.

    Args:
        metadata: the trainer's NIXL metadata.
        rows: [n, 3] uint64: offset in its buffer, address at the trainer, bytes.
        nbytes: size of its buffer.
    """

    def __init__(self, metadata: bytes, rows: Descriptors, nbytes: int) -> None:
        self._link, theirs = Pipe()
        self._process = ForkedProcess(
            _serve,
            (theirs, metadata, rows, nbytes),
            log=Path(os.devnull),
            # It drops UCX_TLS=tcp unless this says that it is meant.
            environment={"NIXL_UCX_TLS": os.environ.get("UCX_TLS", "")},
        )
        theirs.close()
        self._receive(READY_S)
        os.kill(self._process.pid, signal.SIGSTOP)

    def run(self) -> Cost:
        """Pull everything once, by its own clocks."""
        return Cost(*self._ask("pull"))

    def digest(self) -> bytes:
        """Digest of its buffer."""
        return bytes(self._ask("digest"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10)
        self._link.close()

    def _ask(self, request: str) -> Any:
        os.kill(self._process.pid, signal.SIGCONT)
        self._link.send(request)
        answer = self._receive(READY_S)
        os.kill(self._process.pid, signal.SIGSTOP)
        return answer

    def _receive(self, seconds: float) -> Any:
        if not self._link.poll(seconds):
            self.close()
            raise RuntimeError(f"ModelExpress did not answer within {seconds:.0f} s")
        return self._link.recv()


class _HostMemory:
    """An accelerator in ModelExpress's sense whose memory is the host's."""

    name = torch_device_type = "cpu"
    nixl_mem_type = "DRAM"

    def set_device(self, device_id: int) -> None: ...

    def synchronize(self, device_id: int | None = None) -> None: ...


def _serve(link: Connection, metadata: bytes, rows: Descriptors, nbytes: int) -> None:
    if not os.environ["NIXL_UCX_TLS"]:
        del os.environ["NIXL_UCX_TLS"]
    from modelexpress.nixl_transfer import NixlTransferManager
    from modelexpress.refit.reshard.transport import NixlReshardTransport, ReadDescriptor

    manager = NixlTransferManager(
        f"modelexpress-{os.getpid()}-{secrets.token_hex(3)}", 0, accelerator_backend=_HostMemory()
    )
    manager.initialize()
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    manager.register_dram_buffer(buffer)
    agent = manager.add_remote_agent(metadata)
    transport = NixlReshardTransport(manager, {SESSION: agent}, {SESSION: 0}, mem_type="DRAM")
    local = rows.astype(np.int64) + np.array([buffer.data_ptr(), 0, 0])
    ranges = [
        ReadDescriptor(session=SESSION, src_addr=source, dst_addr=target, nbytes=size)
        for target, source, size in local.tolist()
    ]
    link.send("ready")
    while True:
        try:
            request = link.recv()
        except EOFError:
            sys.exit()
        if request == "digest":
            link.send(hashlib.blake2b(buffer.numpy().data).digest())
            continue
        clock = Clock()
        transport.read(ranges)
        link.send(clock.cost())
