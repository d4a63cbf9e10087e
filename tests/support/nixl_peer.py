"""A peer in a process of its own: offers one registered buffer with a known pattern.

Run as a script it is the peer; imported it gives `PeerProcess`, the handle to one. The two talk
in JSON over a socket pair, because UCX writes its log lines to stdout.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0


def pattern(nbytes: int, seed: int | None) -> npt.NDArray[np.uint8]:
    """Bytes without a short period, another sequence for every seed; without one all 0xFF.

    0xFF bytes are NaN in every float dtype.
    """
    if seed is None:
        return np.full(nbytes, 0xFF, dtype=np.uint8)
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def damaged(metadata: bytes) -> bytes:
    """Metadata that ends the process that loads it: NIXL takes a kind of memory as an index."""
    tag = b"nixlSDList|t"
    kind = metadata.index(tag) + len(tag) + 8
    return metadata[:kind] + b"\xff" + metadata[kind + 1 :]


class PeerProcess:
    """A running peer: its agent's name, metadata, and the address of its buffer."""

    def __init__(self, agent: str, nbytes: int, seed: int, env: dict[str, str]) -> None:
        self._link, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), agent, str(nbytes), str(seed)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.agent = agent
        self.nbytes = nbytes
        said = self._hear()
        self.address = int(said["address"])
        self.metadata = base64.b64decode(said["metadata"])

    def contents(self) -> npt.NDArray[np.uint8]:
        """The peer's buffer as it is at this moment, without the peer's help."""
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as memory:
            read = os.pread(memory.fileno(), self.nbytes, self.address)
        return np.frombuffer(read, dtype=np.uint8)

    def ask(self, do: str, **arguments: int | None) -> dict[str, Any]:
        """Have the peer do something (`fill`, `close`) and wait for its answer."""
        self._link.send_bytes(json.dumps({"do": do, **arguments}).encode())
        return self._hear()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a peer that it kills or stops is waited for.

        Until one of its threads has run, a process that was sent SIGSTOP goes on.
        """
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        elif number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def end(self) -> None:
        """Kill the peer, whatever state it is in."""
        self.process.kill()
        self.process.wait()
        self._link.close()

    def _hear(self) -> dict[str, Any]:
        if not self._link.poll(READY_S):
            raise TimeoutError(f"the peer {self.agent} said nothing for {READY_S} s")
        heard: dict[str, Any] = json.loads(self._link.recv_bytes())
        return heard


def _serve(link: Connection, agent: str, nbytes: int, seed: int) -> None:
    from engine_plugins.weights.transport.nixl import NixlTransport

    transport = NixlTransport(agent)
    buffer = pattern(nbytes, seed)
    address = int(buffer.ctypes.data)
    transport.register(address, nbytes, -1)
    offer = {
        "address": address,
        "metadata": base64.b64encode(transport.metadata()).decode(),
    }
    link.send_bytes(json.dumps(offer).encode())
    while True:
        try:
            asked = json.loads(link.recv_bytes())
        except EOFError:
            return
        if asked["do"] == "fill":
            buffer[:] = pattern(nbytes, asked["seed"])
        elif asked["do"] == "close":
            transport.close()
        link.send_bytes(b"{}")


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
